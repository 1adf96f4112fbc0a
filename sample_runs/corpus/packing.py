"""A run's tables in one small file: what the detectors are given of it, and what became of it.

The arrays of an `.npz` file, with F frames (a measured step with all steps since the one before; a run's last step
closes an unmeasured last one), S steps, H heads and P parameters:

    steps (F,), every_step (S,), ends (F,)       int32; `ends`: index into `every_step` just behind the frame
    losses (S,), loss_given (S,), scalars.* (S,)  float32, bool
    attention.*, spectra.* (F, H); updates.* (F, P)   float32 rounded to 10 bits behind the leading one; NaN: not measured
    heads, parameters, about                     JSON: [[layer, head], ...], [name, ...], {...}

`update_sigma1` is left out: it is ratio times sigma1. The members are packed with LZMA, a quarter smaller than what
numpy's own function writes; `numpy.load` reads them all the same.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.lib.format import write_array
from numpy.typing import NDArray

from diagnostics import open_run

Arrays = dict[str, NDArray[Any]]

COLUMNS = {
    "attention": ("entropy", "entropy_min", "entropy_frac", "entropy_bound", "max_logit", "rank_frac"),
    "spectra": ("sigma1", "sec_1", "sec_4", "sec_10", "stable_rank", "effective_rank"),
    "updates": ("sigma1", "ratio", "scale"),
}
NO_SCALARS = ("step", "time_s", "loss", "measured", "overhead_s")
DROPPED_BITS = 13
"""Of float32's 23: what is left is good to one part in 2,000."""


def gather(run_dir: Path) -> Arrays:
    """The arrays of a run directory, `about` left out.

    Raises:
        ValueError: steps are missing.
    """
    run = open_run(run_dir)
    steps = run.table("steps")
    every_step_s = _column(steps, "step").astype(np.int64)
    if not np.array_equal(every_step_s, np.arange(len(every_step_s))):
        raise ValueError(
            f"{run_dir}: not every step from 0 on is there; delete the directory and make it again"
        )
    measured_s = _column(steps, "measured").astype(bool)
    closing_s = measured_s.copy()
    closing_s[-1] = True
    ends_f = np.flatnonzero(closing_s) + 1
    step_f = every_step_s[ends_f - 1]
    loss_s = _column(steps, "loss")
    arrays: Arrays = {
        "steps": step_f.astype(np.int32),
        "every_step": every_step_s.astype(np.int32),
        "ends": ends_f.astype(np.int32),
        "losses": loss_s.astype(np.float32),
        # Each step of the corpus hands in its loss: a null stands for NaN.
        "loss_given": np.ones(len(loss_s), dtype=bool),
    }
    for name in steps.column_names:
        if name not in NO_SCALARS:
            arrays[f"scalars.{name}"] = _column(steps, name).astype(np.float32)
    tables = {name: run.table(name) for name in COLUMNS}
    heads = sorted({key for name in ("attention", "spectra") for key in _head_keys(tables[name])})
    parameters = sorted(set(tables["updates"].column("parameter").to_pylist()))
    arrays |= _spread(tables["attention"], "attention", _head_keys(tables["attention"]), heads, step_f)
    arrays |= _spread(tables["spectra"], "spectra", _head_keys(tables["spectra"]), heads, step_f)
    arrays |= _spread(
        tables["updates"], "updates", tables["updates"].column("parameter").to_pylist(), parameters, step_f
    )
    return arrays | {
        "heads": np.array(json.dumps(heads)),
        "parameters": np.array(json.dumps(parameters)),
    }


def write(path: Path, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> None:
    """Writes the arrays of `gather` with what is to be said of the run; the same arrays give the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    members = {**arrays, "about": np.array(json.dumps(about, sort_keys=True))}
    with zipfile.ZipFile(part, "w", zipfile.ZIP_LZMA) as packed:
        for name, values in members.items():
            # A member that is opened by name bears no time of day.
            with packed.open(f"{name}.npy", "w") as member:
                # Column by column: a head's neighbouring steps resemble each other, neighbouring heads do not.
                by_column = np.asfortranarray(values) if values.ndim > 1 else values
                write_array(member, by_column, allow_pickle=False)
    part.replace(path)


def read(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """The arrays as `gather` made them (rounded), and what is said of the run."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files if name != "about"}
        about: dict[str, Any] = json.loads(str(file["about"]))
    return arrays, about


def rounded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """To the nearest float32 whose last bits are zero; infinities and NaN stay what they are."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    half = np.uint32(1 << (DROPPED_BITS - 1))
    nearest = ((bits + half) >> np.uint32(DROPPED_BITS)) << np.uint32(DROPPED_BITS)
    return np.where(np.isfinite(values), nearest.view(np.float32), values).astype(np.float32)


def _column(table: pa.Table, name: str) -> NDArray[Any]:
    """A column as numpy; nulls are NaN."""
    return np.asarray(table.column(name).to_numpy(zero_copy_only=False))


def _head_keys(table: pa.Table) -> list[tuple[str, int]]:
    layers, heads = table.column("layer").to_pylist(), table.column("head").to_pylist()
    return list(zip(layers, heads, strict=True))


def _spread(
    table: pa.Table, prefix: str, keys: list[Any], columns: list[Any], step_f: NDArray[np.int64]
) -> Arrays:
    """A long table as one (F, columns) array a value."""
    place = {key: index for index, key in enumerate(columns)}
    at = np.array([place[key] for key in keys], dtype=np.int64)
    frame = np.searchsorted(step_f, _column(table, "step"))
    arrays: Arrays = {}
    for name in COLUMNS[prefix]:
        spread = np.full((len(step_f), len(columns)), np.nan, dtype=np.float32)
        spread[frame, at] = _column(table, name).astype(np.float32)
        arrays[f"{prefix}.{name}"] = rounded(spread)
    return arrays
