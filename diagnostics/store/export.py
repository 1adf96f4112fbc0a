"""`export_run`: a run's tables in other tools' formats."""

import csv
import json
import math
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa

from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import TABLES
from diagnostics.store.read import Run

FORMATS = ("csv", "tensorboard", "jsonl")

# What names a series in TensorBoard; every other number of a row is a value of it.
_KEYS = ("layer", "head", "parameter")
_NOT_VALUES = ("step", "time_s", *_KEYS)


def export_run(run: Run, to: str, out: str | os.PathLike[str]) -> dict[Path, int]:
    """Writes every table of a run into the folder `out`.

    `csv` and `jsonl` give one file per table, named after it. What was not measured is an empty field or null.
    What was measured and is not finite is `NaN`, `Infinity` or `-Infinity`, in JSON as a string, as strict JSON
    has no such numbers. A list (the singular values) is a JSON array, in csv within its one field.
    `tensorboard` gives an event file of scalars tagged `<table>/<layer>/head<head>/<column>`; lists, words, flags
    and events are left out, and a value is drawn at the time its step was closed.

    Args:
        run: the run.
        to: `csv`, `tensorboard` or `jsonl`.
        out: a folder that is empty or does not exist.

    Returns:
        What was written: path to number of rows (of values for `tensorboard`).

    Raises:
        DiagnosticsError: an unknown format, a folder that holds something, or `tensorboard` is not installed.
    """
    if to not in FORMATS:
        raise DiagnosticsError(f"there is no format {to!r}; the formats are {', '.join(FORMATS)}")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise DiagnosticsError(f"{folder} is a file; give a folder that is empty or does not exist")
    if folder.is_dir() and any(folder.iterdir()):
        raise DiagnosticsError(f"{folder} is not empty; give another folder, or empty this one")
    if to == "tensorboard":
        return _to_tensorboard(run, folder)
    folder.mkdir(parents=True, exist_ok=True)
    write = _to_csv if to == "csv" else _to_jsonl
    return {path: write(run.table(table), path) for table in TABLES for path in [folder / f"{table}.{to}"]}


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as Python values; floats as short as they can be read back."""
    narrow = {field.name for field in table.schema if field.type == pa.float32()}
    lists = {field.name for field in table.schema if field.type == pa.list_(pa.float32())}
    for row in _plain_rows(table):
        for name in narrow:
            row[name] = _plain(row[name])
        for name in lists:
            row[name] = None if row[name] is None else [_plain(value) for value in row[name]]
        yield row


def _plain_rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Rows as Python values, one batch in memory at a time."""
    for batch in table.to_batches(max_chunksize=4096):
        yield from batch.to_pylist()


def _plain(value: float | None) -> float | None:
    # A float32 widened to float64 prints digits that were never measured; nine significant ones keep it exactly.
    return None if value is None else float(f"{value:.9g}")


def _to_csv(table: pa.Table, path: Path) -> int:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(table.column_names)
        writer.writerows([_field(value) for value in row.values()] for row in _rows(table))
    return int(table.num_rows)


def _field(value: Any) -> Any:  # noqa: ANN401 - whatever the tables hold
    if isinstance(value, list):
        return json.dumps(_finite(value), allow_nan=False)
    return str(value).lower() if isinstance(value, bool) else _finite(value)


def _to_jsonl(table: pa.Table, path: Path) -> int:
    with path.open("w", encoding="utf-8") as file:
        for row in _rows(table):
            strict = {name: _finite(value) for name, value in row.items()}
            file.write(json.dumps(strict, allow_nan=False, ensure_ascii=False) + "\n")
    return int(table.num_rows)


def _finite(value: Any) -> Any:  # noqa: ANN401 - whatever the tables hold
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _to_tensorboard(run: Run, folder: Path) -> dict[Path, int]:
    try:
        # Its own writer, not torch's SummaryWriter: reading a run needs no torch.
        event_file_writer = import_module("tensorboard.summary.writer.event_file_writer")
        event_pb2 = import_module("tensorboard.compat.proto.event_pb2")
        summary_pb2 = import_module("tensorboard.compat.proto.summary_pb2")
    except ModuleNotFoundError as error:
        raise DiagnosticsError(
            f"the format tensorboard needs the package tensorboard (no module {error.name!r}): pip install tensorboard"
        ) from None
    steps = run.table("steps", ["step", "time_s"]).to_pydict()
    closed_s = dict(zip(steps["step"], steps["time_s"], strict=True))
    writer = event_file_writer.EventFileWriter(str(folder))
    written = 0
    for table in ("steps", "attention", "spectra", "updates"):
        lists = {column.name for column in TABLES[table] if pa.types.is_list(column.type)}
        columns = [column.name for column in TABLES[table] if column.name not in lists] if lists else None
        for row in _plain_rows(run.table(table, columns)):
            values = [
                summary_pb2.Summary.Value(tag=f"{_series(table, row)}/{name}", simple_value=float(value))
                for name, value in row.items()
                if name not in _NOT_VALUES and isinstance(value, (int, float)) and not isinstance(value, bool)
            ]
            # A step whose own row is not on disk yet has no time; the epoch would tear the time axis apart.
            wall_time = closed_s.get(row["step"])
            if values and wall_time is not None:
                summary = summary_pb2.Summary(value=values)
                writer.add_event(event_pb2.Event(wall_time=wall_time, step=row["step"], summary=summary))
                written += len(values)
    writer.close()
    return {folder: written}


def _series(table: str, row: dict[str, Any]) -> str:
    keys = [
        f"head{row[key]}" if key == "head" else str(row[key]) for key in _KEYS if row.get(key) is not None
    ]
    return "/".join([table, *keys])
