"""Run directories with known contents, written without the recorder, for tests of the viewing half."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diagnostics.store.format import MANIFEST, SCHEMA_VERSION, SCHEMAS, metric_metadata, part_name
from diagnostics.store.migrate import OF_AN_ATTEMPT

LAYERS = ("blocks.0.attn", "blocks.1.attn")
HEADS = 2
PARAMETERS = ("blocks.0.attn.c_attn.weight", "blocks.1.attn.c_attn.weight")


def write_table(run_dir: Path, table: str, rows: list[dict[str, Any]], number: int = 0) -> Path:
    schema = SCHEMAS[table]
    extra = sorted({key for row in rows for key in row} - set(schema.names))
    for name in extra:
        schema = schema.append(pa.field(name, pa.float64()))
    (run_dir / table).mkdir(parents=True, exist_ok=True)
    steps = [row["step"] for row in rows]
    path = run_dir / table / part_name(min(steps), max(steps), number)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def manifest(run_id: str, **changes: Any) -> dict[str, Any]:
    """What run.json says of a run of one attempt; of several where `attempts` is given."""
    now = time.time()
    told = {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "state": "finished",
        "started_s": now - 60.0,
        "heartbeat_s": now,
        "last_step_s": now,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "every": 10,
        "steps": 0,
        "config": {"lr": 3e-3},
        "model": {"class": "GPT", "parameters": 1000},
        "sites": [
            {
                "name": name,
                "heads": HEADS,
                "kv_heads": HEADS,
                "head_dim": 4,
                "scale": None,
                "layout": "fused",
                "flags": [],
            }
            for name in LAYERS
        ],
        "skipped": {},
        "metrics": metric_metadata(),
        "faults": [],
        "status": "healthy",
        **changes,
    }
    only = {
        "attempt": 1,
        "first_step": 0 if told["steps"] else None,
        **{key: told.get(key) for key in OF_AN_ATTEMPT},
    }
    return {"attempt": 1, "attempts": [only], **told}


def write_run(
    root: Path, name: str = "run", *, steps: int = 100, every: int = 10, collapse: bool = False, **info: Any
) -> Path:
    """A run of `steps` steps; with `collapse` entropy falls, SEC and logits rise from the middle on, the loss stalls."""
    run_dir = root / name
    run_dir.mkdir(parents=True)
    start = time.time() - steps
    rng = np.random.default_rng(0)
    step_rows, attention_rows, spectra_rows, update_rows = [], [], [], []
    for step in range(steps):
        done = step / max(1, steps - 1)
        bad = max(0.0, done - 0.3) / 0.7 if collapse else 0.0
        measured = step % every == 0
        loss = 5.5 * np.exp(-3 * min(done, 0.3 if collapse else 1.0)) + 0.01 * rng.standard_normal()
        step_rows.append(
            {
                "step": step,
                "time_s": start + step,
                "loss": float(loss),
                "lr": 3e-3,
                "grad_norm": 1.0 if measured else None,
                "measured": measured,
                "overhead_s": 1e-3 if measured else 1e-6,
            }
        )
        if not measured:
            continue
        for layer in LAYERS:
            for head in range(HEADS):
                attention_rows.append(
                    {
                        "step": step,
                        "layer": layer,
                        "head": head,
                        "entropy": 3.5 * (1 - bad) + 0.02,
                        "entropy_min": 2.0 * (1 - bad),
                        "entropy_frac": 0.9 * (1 - bad) + 0.01,
                        "entropy_bound": 0.5 * (1 - bad),
                        "max_logit": 1.0 + 150.0 * bad,
                        "rank_frac": 0.5 * (1 - bad) + 0.03,
                        "rows": 256,
                    }
                )
                sigma = np.array([1.0 + 30 * bad, 0.9, 0.8, 0.7])
                energy = np.cumsum(sigma**2) / np.sum(sigma**2)
                spectra_rows.append(
                    {
                        "step": step,
                        "layer": layer,
                        "head": head,
                        "sigma1": sigma[0],
                        "frobenius": float(np.linalg.norm(sigma)),
                        "sec_1": energy[0],
                        "sec_4": 1.0,
                        "sec_10": 1.0,
                        "stable_rank": 1 / energy[0],
                        "effective_rank": 4 * (1 - bad) + 1 * bad,
                        "singular_values": sigma.tolist(),
                    }
                )
        update_rows += [
            {
                "step": step,
                "parameter": parameter,
                "sigma1": 1.0 + done,
                "update_sigma1": 0.01,
                "ratio": 0.01 / (1 + done),
                "frobenius_ratio": 0.01,
                "scale": 1.0,
            }
            for parameter in PARAMETERS
        ]
    if steps:
        write_table(run_dir, "steps", step_rows)
        write_table(run_dir, "attention", attention_rows)
        write_table(run_dir, "spectra", spectra_rows)
        write_table(run_dir, "updates", update_rows)
    if collapse:
        write_table(
            run_dir,
            "events",
            [
                {
                    "step": (steps // 2) // every * every,
                    "time_s": start,
                    "kind": "alert",
                    "severity": "critical",
                    "layer": LAYERS[0],
                    "head": 1,
                    "message": "attention entropy is collapsing",
                    "data": json.dumps({"kind": "entropy-collapse"}),
                }
            ],
        )
    (run_dir / MANIFEST).write_text(json.dumps(manifest(name, **{"steps": steps, "every": every, **info})))
    return run_dir
