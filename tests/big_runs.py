"""Run directories as large as they get, written without the recorder: a thousand small runs, and one of 10^6 steps.

`python tests/big_runs.py runs DIR` and `python tests/big_runs.py run DIR` write them for a look by hand.
"""

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from many_runs import attempt_entry, site_entries
from many_runs import write_runs as write_runs  # noqa: PLC0414 - both kinds of large fixtures are found here
from synthetic import manifest

from diagnostics.store.coarse.tables import coarse_schema, stored_resolutions
from diagnostics.store.format import COARSE, MANIFEST, RESOLUTIONS, SCHEMAS, PartName

Floats = npt.NDArray[np.float32]

ROW_GROUP_ROWS = 16_384
FILE_BYTES = 32 * 2**20
_SCALAR = "accuracy"
_ROWS = 256
# Seven metrics of each head are measured, the other columns are null: 12 layers of 12 heads give 1,008 series.
ATTENTION = ("entropy", "entropy_min", "max_logit", "rank_frac")
SPECTRA = ("sigma1", "sec_1", "effective_rank")
# Typical value, slow change over the run, noise: what the series of a healthy run look like from afar.
_COURSE = {
    "entropy": (3.0, -0.6, 0.05),
    "entropy_min": (1.8, -0.5, 0.05),
    "max_logit": (6.0, 4.0, 0.30),
    "rank_frac": (0.45, -0.1, 0.01),
    "sigma1": (1.5, 3.0, 0.01),
    "sec_1": (0.25, 0.2, 0.005),
    "effective_rank": (20.0, -6.0, 0.10),
}
# A measured float32 is noise in its last bits; these 9 of the 23 are left zero, which saves a quarter of the disk.
_KEPT_BITS = np.uint32(0xFFFFFE00)
_ROW_BYTES = {"steps": 46.0, "attention": 13.0, "spectra": 10.0, "updates": 21.0}


@dataclass(frozen=True)
class BigRun:
    """What is in a run that `write_big_run` wrote.

    Attributes:
        path: the run directory.
        steps: steps closed, each with a row in `steps`.
        every: distance of the measured steps.
        layers: module paths, in the order in which the files are sorted.
        heads: of each layer.
        loss_spike: step and loss of the one step whose loss jumps; not a measured one.
        entropy_dip: layer, head, step and entropy of the one value that drops.
    """

    path: Path
    steps: int
    every: int
    layers: tuple[str, ...]
    heads: int
    loss_spike: tuple[int, float]
    entropy_dip: tuple[str, int, int, float]


def write_big_run(
    run_dir: Path,
    *,
    steps: int = 1_000_000,
    every: int = 10,
    layers: int = 12,
    heads: int = 12,
    singular_values: int = 0,
    file_bytes: int = FILE_BYTES,
    seed: int = 0,
    **info: Any,
) -> BigRun:
    """Writes a finished run as its writer leaves it once every part file is merged.

    Every 1,000 steps of the defaults take about 0.4 MB on disk. Coarse tables hold complete buckets only.

    Args:
        run_dir: made here.
        steps: closed steps.
        every: distance of the measured steps.
        layers: attention layers.
        heads: heads of each.
        singular_values: length of `singular_values`; 0: null, as they are the bulk of a run that has them.
        file_bytes: about how large the part files are.
        seed: of the noise.
        info: further entries of run.json.
    """
    names = tuple(sorted(f"blocks.{number}.attn" for number in range(layers)))
    measured = np.arange(0, steps, every, dtype=np.int64)
    dip_at = measured[int(0.37 * len(measured))]
    spike_at = int(0.62 * steps) // every * every + every // 2
    run = BigRun(
        run_dir,
        steps,
        every,
        names,
        heads,
        (spike_at, 40.0),
        (names[-1], heads - 1, int(dip_at), 0.0625),
    )
    rng = np.random.default_rng(seed)
    run_dir.mkdir(parents=True)
    last_loss = _write_steps(run, rng, file_bytes)
    _write_heads(run, "attention", ATTENTION, rng, file_bytes, width=0)
    sec_1 = _write_heads(run, "spectra", SPECTRA, rng, file_bytes, width=singular_values)["sec_1"]
    _write_updates(run, rng, file_bytes)
    _write_events(run)
    summary = {
        "last_loss": last_loss,
        "lowest_entropy": run.entropy_dip[3],
        "highest_sec": float(sec_1.mean(axis=0, dtype=np.float64).max()),
        "last_measured_step": int(measured[-1]),
    }
    content = _big_manifest(run, **{"summary": summary, **info})
    (run_dir / MANIFEST).write_text(json.dumps(content, indent=1))
    return run


def _write_steps(run: BigRun, rng: np.random.Generator, file_bytes: int) -> float:
    """Returns the last loss."""
    step = np.arange(run.steps, dtype=np.int64)
    done = step / run.steps
    measured = step % run.every == 0
    loss = 2.0 + 3.5 * np.exp(-6 * done) + 0.05 * rng.standard_normal(run.steps)
    loss[run.loss_spike[0]] = run.loss_spike[1]
    columns: dict[str, Any] = {
        "step": step,
        "time_s": 1.7e9 + 0.1 * step + 0.001 * rng.random(run.steps),
        "loss": loss,
        "lr": 3e-4 * (1 - 0.9 * done),
        "grad_norm": np.where(measured, 1.0 + 0.1 * rng.standard_normal(run.steps), np.nan),
        "measured": measured,
        "overhead_s": np.where(measured, 1e-3, 1e-6) * (1 + 0.1 * rng.random(run.steps)),
        _SCALAR: 1 - loss / 10,
    }
    chunk = max(1, int(file_bytes / _ROW_BYTES["steps"]))
    for number, begin in enumerate(range(0, run.steps, chunk)):
        part = {name: values[begin : begin + chunk] for name, values in columns.items()}
        part["grad_norm"] = pa.array(part["grad_norm"], from_pandas=True)
        _write(run.path, "steps", part, part["step"][0], part["step"][-1], number)
    metrics = ("time_s", "loss", "lr", "grad_norm", "overhead_s", _SCALAR)
    for resolution in RESOLUTIONS:
        keys = {"step": _bucket_starts(run, resolution)}
        _write_coarse(
            run, "steps", resolution, keys, step, {name: columns[name][None, :] for name in metrics}
        )
    return float(loss[-1])


def _write_heads(
    run: BigRun,
    table: str,
    metrics: tuple[str, ...],
    rng: np.random.Generator,
    file_bytes: int,
    *,
    width: int,
) -> dict[str, Floats]:
    """Returns every metric's values: one row per head, one column per measured step."""
    measured = np.arange(0, run.steps, run.every, dtype=np.int64)
    pairs = len(run.layers) * run.heads
    values = {metric: _series(metric, pairs, len(measured), rng) for metric in metrics}
    if table == "attention":
        layer, head, step, entropy = run.entropy_dip
        row = run.layers.index(layer) * run.heads + head
        values["entropy"][row, step // run.every] = entropy
    layer_of = np.repeat(np.arange(len(run.layers)), run.heads)
    head_of = np.tile(np.arange(run.heads, dtype=np.int16), len(run.layers))
    per_row = _ROW_BYTES[table] + 3.5 * width
    chunk = max(1, int(file_bytes / per_row / pairs))
    for number, begin in enumerate(range(0, len(measured), chunk)):
        part = slice(begin, begin + chunk)
        count = len(measured[part])
        columns: dict[str, Any] = {
            "step": np.tile(measured[part], pairs),
            "layer": _words(run.layers, np.repeat(layer_of, count)),
            "head": np.repeat(head_of, count),
            **{metric: array[:, part].reshape(-1) for metric, array in values.items()},
        }
        if table == "attention":
            columns["rows"] = np.full(pairs * count, _ROWS, np.int32)
        elif width:
            columns["singular_values"] = _spectra(columns["sigma1"], width, rng)
        _write(run.path, table, columns, measured[part][0], measured[part][-1], number)
    for resolution in stored_resolutions(table, run.every):
        starts = _bucket_starts(run, resolution)
        keys = {
            "step": np.tile(starts, pairs),
            "layer": _words(run.layers, np.repeat(layer_of, len(starts))),
            "head": np.repeat(head_of, len(starts)),
        }
        coarse = dict(values)
        if table == "attention":
            coarse["rows"] = np.full((pairs, len(measured)), _ROWS, np.float32)
        _write_coarse(run, table, resolution, keys, measured, coarse)
    return values


def _write_updates(run: BigRun, rng: np.random.Generator, file_bytes: int) -> None:
    measured = np.arange(0, run.steps, run.every, dtype=np.int64)
    names = tuple(f"{layer}.c_attn.weight" for layer in run.layers)
    sigma1 = _series("sigma1", len(names), len(measured), rng)
    update = (0.004 * sigma1 * (1 + 0.1 * rng.standard_normal(sigma1.shape, dtype=np.float32))).astype(
        np.float32
    )
    values = {
        "sigma1": sigma1,
        "update_sigma1": update,
        "ratio": update / sigma1,
        "frobenius_ratio": update / (3 * sigma1),
        "scale": np.ones_like(sigma1),
    }
    chunk = max(1, int(file_bytes / _ROW_BYTES["updates"] / len(names)))
    for number, begin in enumerate(range(0, len(measured), chunk)):
        part = slice(begin, begin + chunk)
        count = len(measured[part])
        columns = {
            "step": np.tile(measured[part], len(names)),
            "parameter": _words(names, np.repeat(np.arange(len(names)), count)),
            **{metric: array[:, part].reshape(-1) for metric, array in values.items()},
        }
        _write(run.path, "updates", columns, measured[part][0], measured[part][-1], number)
    for resolution in stored_resolutions("updates", run.every):
        starts = _bucket_starts(run, resolution)
        keys = {
            "step": np.tile(starts, len(names)),
            "parameter": _words(names, np.repeat(np.arange(len(names)), len(starts))),
        }
        _write_coarse(run, "updates", resolution, keys, measured, values)


def _write_events(run: BigRun) -> None:
    layer, head, step, _ = run.entropy_dip
    columns: dict[str, Any] = {
        "step": [step],
        "time_s": [1.7e9 + 0.1 * step],
        "kind": ["alert"],
        "severity": ["warning"],
        "layer": [layer],
        "head": [head],
        "message": ["attention entropy fell for one step"],
        "data": [json.dumps({"kind": "entropy-collapse"})],
    }
    _write(run.path, "events", columns, step, step, number=0)


def _series(metric: str, pairs: int, count: int, rng: np.random.Generator) -> Floats:
    """One row per head: each with a level of its own, one slow course and white noise."""
    level, change, noise = _COURSE[metric]
    course = np.linspace(0.0, change, count, dtype=np.float32)
    values = rng.standard_normal((pairs, count), dtype=np.float32)
    values *= np.float32(noise)
    values += course
    values += (level * (0.9 + 0.2 * rng.random((pairs, 1)))).astype(np.float32)
    bits = values.view(np.uint32)
    bits &= _KEPT_BITS
    return values


def _spectra(sigma1: Floats, width: int, rng: np.random.Generator) -> pa.Array:
    decay = np.sort(rng.random((len(sigma1), width), dtype=np.float32))[:, ::-1]
    decay[:, 0] = 1.0
    offsets = np.arange(0, len(sigma1) * width + 1, width, dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, (decay * sigma1[:, None]).reshape(-1))


def _bucket_starts(run: BigRun, resolution: int) -> npt.NDArray[np.int64]:
    return np.arange(0, run.steps // resolution * resolution, resolution, dtype=np.int64)


def _write_coarse(
    run: BigRun,
    table: str,
    resolution: int,
    keys: Mapping[str, Any],
    step: npt.NDArray[np.int64],
    values: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Writes one coarse table in one file; its rows are worked out with numpy, apart from the writer's own code.

    Args:
        run: the run.
        table: name of the table.
        resolution: steps of a bucket.
        keys: key columns of the coarse table.
        step: the steps of the values.
        values: by metric, one row per key without its step, one column per step; NaN: null.
    """
    complete = run.steps // resolution * resolution
    if not complete:
        return
    kept = int(np.searchsorted(step, complete))
    edges = np.searchsorted(step[:kept], _bucket_starts(run, resolution))
    columns = dict(keys)
    for metric, array in values.items():
        columns |= _aggregated(metric, array[:, :kept], edges)
    _write(run.path / COARSE / str(resolution), table, columns, 0, complete - 1, 0, resolution=resolution)


def _aggregated(metric: str, array: npt.NDArray[Any], edges: npt.NDArray[np.int64]) -> dict[str, Any]:
    known = np.isfinite(array)
    count = np.add.reduceat(known, edges, axis=1, dtype=np.int64)
    none = count == 0
    low = np.minimum.reduceat(np.where(known, array, np.inf), edges, axis=1)
    high = np.maximum.reduceat(np.where(known, array, -np.inf), edges, axis=1)
    total = np.add.reduceat(np.where(known, array, 0.0), edges, axis=1, dtype=np.float64)
    position = np.where(known, np.arange(array.shape[1]), -1)
    last_at = np.maximum.reduceat(position, edges, axis=1)
    last = np.take_along_axis(array, np.maximum(last_at, 0), axis=1)
    mean = total / np.maximum(count, 1)
    columns = {"min": low, "max": high, "mean": mean, "last": last}
    return {
        **{f"{metric}_{what}": pa.array(v.reshape(-1), mask=none.reshape(-1)) for what, v in columns.items()},
        f"{metric}_count": count.reshape(-1),
        f"{metric}_nonfinite": np.zeros(count.size, np.int64),
    }


def _write(
    folder: Path,
    table: str,
    columns: Mapping[str, Any],
    first_step: int,
    last_step: int,
    number: int,
    *,
    resolution: int | None = None,
) -> None:
    schema = SCHEMAS[table]
    if table == "steps":
        schema = schema.append(pa.field(_SCALAR, pa.float64(), metadata={"meaning": "user scalar"}))
    if resolution is not None:
        schema = coarse_schema(table, [_SCALAR] if table == "steps" else [], resolution=resolution)
    arrays = [_column(columns, field, len(columns["step"])) for field in schema]
    # A merged file stands for the last flush it holds; each stands for 16 of 16 parts here.
    name = PartName(int(first_step), int(last_step), 256 * (number + 1) - 1, merges=2)
    path = folder / table / str(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = pa.Table.from_arrays(arrays, schema=schema)
    pq.write_table(whole, path, compression="zstd", row_group_size=ROW_GROUP_ROWS)


def _column(columns: Mapping[str, Any], field: pa.Field, length: int) -> pa.Array:
    """A column, of nulls where nothing was measured, as a writer has it; a count of nothing is 0."""
    if field.name in columns:
        return _as(columns[field.name], field.type)
    counts = field.name.endswith(("_count", "_nonfinite"))
    return pa.array(np.zeros(length, np.int32)) if counts else pa.nulls(length, field.type)


def _as(values: Any, kind: pa.DataType) -> pa.Array:
    array = values if isinstance(values, pa.Array) else pa.array(values)
    return array if array.type == kind else array.cast(kind)


def _words(names: tuple[str, ...], indices: npt.NDArray[np.int64]) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(names)).cast(pa.string())


def _big_manifest(run: BigRun, **info: Any) -> dict[str, Any]:
    ended_s = time.time() - 3600.0
    started_s = ended_s - 0.1 * run.steps
    return manifest(
        run.path.name,
        **{
            "steps": run.steps,
            "every": run.every,
            "started_s": started_s,
            "heartbeat_s": ended_s,
            "last_step_s": ended_s,
            "ended_s": ended_s,
            "sites": site_entries(run.layers, run.heads),
            "status": "healthy",
            "attempt": 1,
            "attempts": [attempt_entry(1, 0, started_s, ended_s, "finished", run.every)],
            **info,
        },
    )


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["runs", "run"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--singular-values", type=int, default=0)
    asked = parser.parse_args()
    begun_s = time.perf_counter()
    if asked.what == "runs":
        write_runs(asked.folder, asked.count)
    else:
        write_big_run(asked.folder, steps=asked.steps, singular_values=asked.singular_values)
    print(f"{time.perf_counter() - begun_s:.1f} s")


if __name__ == "__main__":
    _main()
