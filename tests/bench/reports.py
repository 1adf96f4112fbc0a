"""Seconds that `diagnostics report` takes over 1,000 runs: `python tests/bench/reports.py`.

One run of 10^4 steps, measured every 10 steps in 4 layers of 4 heads and 16 matrices, is written to a temporary folder
and linked 1,000 times: the files are then in memory, as those of a sweep that just ended are.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diagnostics.report import assess
from diagnostics.store.format import MANIFEST, SCHEMA_VERSION, SCHEMAS, part_name
from diagnostics.store.read import open_run

STEPS, EVERY, LAYERS, HEADS, MATRICES = 10_000, 10, 4, 4, 16
GOAL_S = 20.0
_GOAL_RUNS = 1000
_READ = ("steps", "attention", "spectra", "updates")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=_GOAL_RUNS)
    runs = parser.parse_args().runs
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"{cores} cores, load before {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="reports-bench-") as name:
        root = Path(name)
        first = write_run(root / "run-0000")
        for number in range(1, runs):
            _link(first, root / f"run-{number:04}")
        read_ms, whole_ms = _one(first)
        print(f"one run: {whole_ms:.1f} ms to judge, {read_ms:.1f} ms of them reading its tables")
        begun_s = time.perf_counter()
        ended = subprocess.run(
            [sys.executable, "-m", "diagnostics", "report", root], check=False, capture_output=True, text=True
        )
        took_s = time.perf_counter() - begun_s
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if ended.returncode not in (0, 1):
        raise SystemExit(f"`diagnostics report` ended with {ended.returncode}: {ended.stderr}")
    print(ended.stdout.splitlines()[-1])
    met = "met" if took_s < GOAL_S else "MISSED"
    verdict = f": {met}" if runs == _GOAL_RUNS else " is for 1,000 runs"
    print(f"report over {runs:,} runs of {STEPS:,} steps: {took_s:.1f} s; goal below {GOAL_S:.0f} s{verdict}")
    print(f"CPU of all its processes: {used.ru_utime + used.ru_stime:.1f} s")
    print(f"load after {os.getloadavg()[0]:.1f}")


def _one(run_dir: Path) -> tuple[float, float]:
    """Milliseconds to read one run and to judge it, reading included; medians of several."""
    read_s, whole_s = [], []
    for _ in range(7):
        begun_s = time.perf_counter()
        run = open_run(run_dir)
        for table in _READ:
            run.table(table)
        read_s.append(time.perf_counter() - begun_s)
        begun_s = time.perf_counter()
        assess(run_dir)
        whole_s.append(time.perf_counter() - begun_s)
    return 1e3 * statistics.median(read_s), 1e3 * statistics.median(whole_s)


def _link(run_dir: Path, copy: Path) -> None:
    for path in run_dir.rglob("*"):
        if path.is_file():
            target = copy / path.relative_to(run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)


def write_run(run_dir: Path) -> Path:
    """A healthy run: the loss falls, all else stays in its band."""
    rng = np.random.default_rng(0)
    step = np.arange(STEPS)
    measured = step[::EVERY]
    now_s = time.time()
    _write(
        run_dir,
        "steps",
        {
            "step": step,
            "time_s": now_s - STEPS + step,
            "loss": 6.0 * (1.0 + step / 100) ** -0.25 + 0.02 * rng.standard_normal(STEPS),
            "lr": np.full(STEPS, 1e-3),
            "grad_norm": np.exp(0.1 * rng.standard_normal(STEPS)),
            "measured": step % EVERY == 0,
            "overhead_s": np.full(STEPS, 1e-5),
        },
    )
    heads = LAYERS * HEADS
    count = len(measured) * heads
    key = {
        "step": np.repeat(measured, heads),
        "layer": np.tile(
            np.repeat([f"blocks.{layer}.attn" for layer in range(LAYERS)], HEADS), len(measured)
        ),
        "head": np.tile(np.arange(HEADS), LAYERS * len(measured)),
    }

    def about(value: float) -> Any:
        return value * np.exp(0.02 * rng.standard_normal(count))

    attention = {
        "entropy": 3.0,
        "entropy_min": 1.5,
        "entropy_frac": 0.7,
        "entropy_bound": 0.1,
        "max_logit": 6.0,
        "rank_frac": 0.4,
    }
    spectra = {
        "sigma1": 2.0,
        "frobenius": 4.0,
        "sec_1": 0.25,
        "sec_4": 0.6,
        "sec_10": 0.9,
        "stable_rank": 4.0,
        "effective_rank": 12.0,
    }
    _write(
        run_dir,
        "attention",
        key | {name: about(value) for name, value in attention.items()} | {"rows": np.full(count, 256)},
    )
    singular = [[2.0, 1.5, 1.2, 1.0]] * count
    _write(
        run_dir,
        "spectra",
        key | {name: about(value) for name, value in spectra.items()} | {"singular_values": singular},
    )
    count = len(measured) * MATRICES
    updates = {"sigma1": 2.0, "update_sigma1": 0.002, "ratio": 0.001, "frobenius_ratio": 0.001}
    _write(
        run_dir,
        "updates",
        {
            "step": np.repeat(measured, MATRICES),
            "parameter": np.tile(
                [f"blocks.{n // 4}.w{n % 4}.weight" for n in range(MATRICES)], len(measured)
            ),
        }
        | {name: about(value) for name, value in updates.items()}
        | {"scale": np.ones(count)},
    )
    (run_dir / MANIFEST).write_text(json.dumps(_manifest(now_s)), encoding="utf-8")
    return run_dir


def _manifest(now_s: float) -> dict[str, Any]:
    sites = [
        {"name": f"blocks.{layer}.attn", "heads": HEADS, "kv_heads": HEADS, "head_dim": 16, "flags": []}
        for layer in range(LAYERS)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "run_id": "bench",
        "state": "finished",
        "started_s": now_s - STEPS,
        "heartbeat_s": now_s,
        "last_step_s": now_s,
        "every": EVERY,
        "steps": STEPS,
        "attempt": 1,
        "attempts": [{"attempt": 1, "first_step": 0, "started_s": now_s - STEPS, "state": "finished"}],
        "config": {},
        "sites": sites,
        "skipped": {},
        "faults": [],
        "status": "healthy",
    }


def _write(run_dir: Path, table: str, columns: dict[str, Any]) -> None:
    (run_dir / table).mkdir(parents=True, exist_ok=True)
    path = run_dir / table / part_name(0, STEPS - 1, 0)
    schema = pa.schema([each for each in SCHEMAS[table] if each.name in columns])
    pq.write_table(pa.table(columns, schema=schema), path)


if __name__ == "__main__":
    main()
