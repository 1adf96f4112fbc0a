"""Run directories by the thousand, small ones, written without the recorder."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from synthetic import manifest

from diagnostics.store.format import MANIFEST, SCHEMAS, PartName

SMALL_STEPS = 200
_SMALL_EVERY = 20
_SMALL_PARTS = 4


def write_runs(
    root: Path, count: int = 1000, *, layers: int = 12, heads: int = 12, tables: bool = True
) -> list[Path]:
    """Writes `count` small runs: of ten seven have finished, one runs, one crashed, one runs as its second attempt.

    The runs that run are of this process: once it has ended, they have crashed.

    Args:
        root: made here.
        count: how many.
        layers: attention sites that each run.json names.
        heads: heads of each.
        tables: whether to write their tables, 12 small files each; without, a run is its run.json.
    """
    root.mkdir(parents=True, exist_ok=True)
    parts = dict(_small_parts()) if tables else {}
    paths = []
    for number in range(count):
        path = root / f"run-{number:05d}"
        path.mkdir()
        for name, content in parts.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)
        (path / MANIFEST).write_text(json.dumps(_small_manifest(number, layers, heads), indent=1))
        paths.append(path)
    return paths


def _small_manifest(number: int, layers: int, heads: int) -> dict[str, Any]:
    now_s = time.time()
    started_s = now_s - 60.0 * (number + 1)
    kind = ("finished",) * 7 + ("running", "crashed", "resumed")
    which = kind[number % len(kind)]
    live = which in ("running", "resumed")
    state = "running" if live else which
    ended_s = None if live else started_s + 30.0
    attempts = [attempt_entry(1, 0, started_s, ended_s, state, _SMALL_EVERY)]
    if which == "resumed":
        attempts[0] |= {"state": "crashed", "ended_s": started_s + 10.0}
        attempts.append(attempt_entry(2, SMALL_STEPS // 2, started_s + 15.0, None, "running", _SMALL_EVERY))
    statuses = ("healthy", "healthy", "healthy", "at-risk", "collapsed", "diverged")
    return manifest(
        f"run-{number:05d}",
        state=state,
        steps=SMALL_STEPS,
        every=_SMALL_EVERY,
        started_s=started_s,
        heartbeat_s=now_s if live else ended_s,
        last_step_s=now_s if live else ended_s,
        ended_s=ended_s,
        error="RuntimeError: out of memory" if which == "crashed" else None,
        sites=site_entries(tuple(f"blocks.{layer}.attn" for layer in range(layers)), heads),
        config={"lr": 1e-4 * (1 + number % 30), "warmup": number % 7 * 100, "seed": number},
        status=statuses[number % len(statuses)],
        summary={
            "last_loss": 2.0 + (number % 97) / 97,
            "lowest_entropy": 0.5 + (number % 89) / 89,
            "highest_sec": 0.2 + (number % 83) / 200,
            "last_measured_step": (SMALL_STEPS - 1) // _SMALL_EVERY * _SMALL_EVERY,
        },
        attempt=len(attempts),
        attempts=attempts,
    )


def attempt_entry(
    number: int, first_step: int, started_s: float, ended_s: float | None, state: str, every: int
) -> dict[str, Any]:
    """One entry of `attempts` in run.json."""
    return {
        "attempt": number,
        "first_step": first_step,
        "started_s": started_s,
        "ended_s": ended_s,
        "state": state,
        "error": None,
        "pid": os.getpid(),
        "host": os.uname().nodename,
        "every": every,
        "config": {},
    }


def site_entries(layers: tuple[str, ...], heads: int) -> list[dict[str, Any]]:
    """What run.json says of the attention sites."""
    site = {
        "heads": heads,
        "kv_heads": heads,
        "head_dim": 64,
        "scale": None,
        "layout": "fused",
        "flags": ["bias"],
    }
    return [{"name": name, **site} for name in layers]


def _small_parts() -> Iterator[tuple[str, bytes]]:
    """Part files of one small run, by their path in it."""
    length = SMALL_STEPS // _SMALL_PARTS
    rng = np.random.default_rng(0)
    layers, heads = ("blocks.0.attn", "blocks.1.attn"), 2
    for number in range(_SMALL_PARTS):
        step = np.arange(number * length, (number + 1) * length, dtype=np.int64)
        measured = step[step % _SMALL_EVERY == 0]
        pairs = len(layers) * heads
        steps: dict[str, Any] = {
            "step": step,
            "time_s": 1.7e9 + step,
            "loss": 3 - step / SMALL_STEPS,
            "lr": np.full(length, 3e-4),
            "measured": step % _SMALL_EVERY == 0,
            "overhead_s": np.full(length, 1e-6),
        }
        keys: dict[str, Any] = {
            "step": np.repeat(measured, pairs),
            "layer": [name for _ in measured for name in layers for _ in range(heads)],
            "head": np.tile(np.arange(heads, dtype=np.int16), len(layers) * len(measured)),
        }
        count = len(keys["step"])
        attention = {**keys, "entropy": 2 + rng.random(count, np.float32), "rows": np.full(count, 256)}
        spectra = {**keys, "sec_1": 0.2 + 0.1 * rng.random(count, np.float32)}
        for table, columns in (("steps", steps), ("attention", attention), ("spectra", spectra)):
            schema = SCHEMAS[table]
            rows = len(columns["step"])
            arrays = [
                pa.array(columns[field.name], field.type)
                if field.name in columns
                else pa.nulls(rows, field.type)
                for field in schema
            ]
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, compression="zstd")
            name = PartName(int(columns["step"][0]), int(columns["step"][-1]), number)
            yield f"{table}/{name}", sink.getvalue().to_pybytes()
