"""Coarse tables: min, max, mean and last of every metric over 16, 256 and 4096 steps.

A picture of 10^6 steps is then drawn from a few thousand rows, and a spike of one step is still in it: nothing
is sampled. They lie in `coarse/<steps>/<table>/`, as part files with the names of all others, whose step range
runs from the first bucket's first step to the last bucket's last.

For each metric m: `m_min`, `m_max` and `m_mean` over its finite values, of which there are `m_count`;
`m_nonfinite` values that are NaN or infinite; `m_last`, the last value that is not null, finite or not. Nulls
enter nothing. `step` is the bucket's first step; a bucket has a row where its table has one.

Coarse tables are derived. A writer stores a bucket only once all its steps lie behind and none of them before
the attempt; what is missing, a reader makes of finer rows with `aggregate`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from diagnostics.store.coarse.buckets import Buckets, combined, joined, lifted
from diagnostics.store.format import (
    COARSE,
    RESOLUTIONS,
    SCHEMAS,
    TABLES,
    PartName,
    scalar_field,
)
from diagnostics.store.parts.file import write_part

KEYS: dict[str, tuple[str, ...]] = {
    "steps": (),
    "attention": ("layer", "head"),
    "spectra": ("layer", "head"),
    "updates": ("parameter",),
}
"""The tables that have coarse ones, and what tells rows of one step apart. Events are no series."""

STATISTICS = ("min", "max", "mean", "last", "count", "nonfinite")

# Columns that say who wrote a part; a user's scalar of that name is a float64.
_WRITER = ("attempt", "rank")
_HEAD_BITS = 15

Ints = npt.NDArray[np.int64]


def metrics_of(table: str, schema: pa.Schema | None = None) -> list[str]:
    """The columns of a table that have coarse ones: its numbers, then the user's scalars in `schema`.

    Args:
        table: one of `KEYS`.
        schema: the raw columns at hand; those of the table that are not among them are left out. None: all.
    """
    own = [
        column.name
        for column in TABLES[table]
        if column.name not in ("step", *KEYS[table])
        and (pa.types.is_floating(column.type) or pa.types.is_integer(column.type))
    ]
    if schema is None:
        return own
    known = SCHEMAS[table].names
    return [name for name in own if name in schema.names] + [
        one.name for one in schema if one.name not in known and _is_scalar(one)
    ]


def coarse_schema(table: str, scalars: Iterable[str] = (), *, resolution: int | None = None) -> pa.Schema:
    """Columns of a coarse table, with unit and meaning in their metadata.

    Args:
        table: one of `KEYS`.
        scalars: the user's own columns of the steps table.
        resolution: steps that a row stands for, which the meanings then name.
    """
    span = "the steps of the row's bucket" if resolution is None else f"{resolution} steps"
    fields = [
        pa.field(
            "step",
            pa.int64(),
            metadata={"unit": "optimizer steps", "meaning": f"first step of the row's bucket of {span}"},
        )
    ]
    fields += [SCHEMAS[table].field(key) for key in KEYS[table]]
    for raw in (*map(SCHEMAS[table].field, metrics_of(table)), *map(scalar_field, scalars)):
        metadata = raw.metadata or {}
        fields += _statistics(
            raw.name,
            raw.type,
            metadata.get(b"unit", b"").decode(),
            metadata.get(b"meaning", b"").decode(),
            span,
        )
    return pa.schema(fields)


def stored_resolutions(table: str, every: int) -> tuple[int, ...]:
    """The resolutions at which a writer that measures every so many steps stores a table.

    A bucket of fewer than four measured steps saves its reader next to nothing.
    """
    apart = 1 if table == "steps" else 4 * every
    return tuple(resolution for resolution in RESOLUTIONS if resolution >= apart)


def aggregate(
    table_name: str, rows: pa.Table, resolution: int, *, from_resolution: int | None = None
) -> pa.Table:
    """Rows of a table, one per bucket and key, as a coarse table holds them.

    Args:
        table_name: one of `KEYS`.
        rows: rows of the table, or of its coarse one where `from_resolution` is given; any order. Only the
            metrics that it holds are in the result, of a coarse one those with all of `STATISTICS`.
        resolution: optimizer steps per bucket.
        from_resolution: optimizer steps that each of `rows` stands for, a divisor of `resolution`; several
            rows of one bucket and key are parts of that bucket. None: `rows` are raw.

    Returns:
        Columns of `coarse_schema`, sorted by step, then by layer or parameter in the order in which they come
        in `rows`, then by head.
    """
    assert from_resolution is None or resolution % from_resolution == 0, (from_resolution, resolution)
    keys = _Keys(table_name)
    buckets = _read_raw(keys, rows) if from_resolution is None else _read_coarse(keys, rows)
    return _to_arrow(keys, combined(buckets, resolution), resolution)


@dataclass
class _Open:
    """One table's buckets that are not complete, by resolution, and those that wait to be written."""

    keys: "_Keys"
    stored: tuple[int, ...]
    open: dict[int, Buckets] = field(default_factory=dict)
    done: dict[int, list[Buckets]] = field(default_factory=dict)
    metrics: list[str] = field(default_factory=list)
    next_step: int = 0


class CoarseWriter:
    """Keeps the coarse tables of one attempt while its rows are written; single-threaded.

    Args:
        run_dir: the run directory; folders are made as needed.
        attempt: the attempt whose rows these are, counted from 1.
        rank: the rank whose rows these are.
        every: steps between two measured ones.
    """

    def __init__(self, run_dir: Path, *, attempt: int, rank: int, every: int) -> None:
        self._run_dir = run_dir
        self._attempt = attempt
        self._rank = rank
        self._first_step: int | None = None
        self._tables = {table: _Open(_Keys(table), stored_resolutions(table, every)) for table in KEYS}

    def take(self, table: str, rows: pa.Table) -> None:
        """Adds rows of a table; steps do not go back from one call to the next, but within one they may.

        All rows of a step come in one call. A table without coarse ones is left alone.
        """
        if table not in self._tables or not rows.num_rows:
            return
        state = self._tables[table]
        taken = _read_raw(state.keys, rows)
        first_step, last_step = int(taken.step_n.min()), int(taken.step_n.max())
        assert first_step >= state.next_step, (table, first_step, state.next_step)
        state.next_step = last_step + 1
        self._first_step = first_step if self._first_step is None else min(self._first_step, first_step)
        # A scalar once seen keeps its columns in every later part, so that globbing readers agree on columns.
        state.metrics += [name for name in taken.metrics if name not in state.metrics]
        for resolution in state.stored:
            before = [state.open[resolution]] if resolution in state.open else []
            buckets = combined(joined([*before, taken], state.metrics), resolution)
            ended_n = buckets.step_n + resolution <= state.next_step
            state.open[resolution] = buckets.where(~ended_n)
            # What began before the attempt did lacks the steps before it; its coarser bucket lacks them too.
            taken = buckets.where(ended_n & (buckets.step_n >= self._first_step))
            if len(taken.step_n):
                state.done.setdefault(resolution, []).append(taken)

    def write(self, number: int, *, least: int = 1) -> None:
        """Writes the complete buckets that are not written yet; those of a file that fails are kept.

        Args:
            number: of the flush, for the part names.
            least: buckets of a resolution below which it waits for more: a file of a few rows is mostly footer,
                and readers make of finer rows what is not written.

        Raises:
            OSError: a file could not be written.
        """
        for table, state in self._tables.items():
            for resolution in sorted(state.done):
                buckets = joined(state.done[resolution], state.metrics)
                if len(np.unique(buckets.step_n)) < least:
                    continue
                self._write_part(table, resolution, _to_arrow(state.keys, buckets, resolution), number)
                del state.done[resolution]

    def _write_part(self, table: str, resolution: int, rows: pa.Table, number: int) -> None:
        steps = rows.column("step").to_numpy()
        name = PartName(
            int(steps.min()), int(steps.max()) + resolution - 1, number, self._attempt, self._rank
        )
        folder = self._run_dir / COARSE / str(resolution) / table
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_part(folder, name, rows)


class _Keys:
    """Numbers one table's keys: names in the order in which they come, heads by their index."""

    def __init__(self, table: str) -> None:
        self.table = table
        self._names: list[str | None] = []
        self._codes: dict[str | None, int] = {}

    def codes(self, rows: pa.Table) -> Ints:
        columns = KEYS[self.table]
        if not columns:
            return np.zeros(rows.num_rows, np.int64)
        codes_n = np.concatenate(
            [np.zeros(0, np.int64), *(self._name_codes(chunk) for chunk in rows.column(columns[0]).chunks)]
        )
        if len(columns) == 1:
            return codes_n
        heads_n: Ints = rows.column(columns[1]).to_numpy().astype(np.int64)
        return (codes_n << _HEAD_BITS) | heads_n

    def columns(self, codes_n: Ints) -> list[pa.Array]:
        columns = KEYS[self.table]
        if not columns:
            return []
        names = pa.array(self._names, pa.string())
        if len(columns) == 1:
            return [names.take(pa.array(codes_n))]
        heads_n = (codes_n & ((1 << _HEAD_BITS) - 1)).astype(np.int16)
        return [names.take(pa.array(codes_n >> _HEAD_BITS)), pa.array(heads_n)]

    def _name_codes(self, chunk: pa.Array) -> Ints:
        plain = chunk.cast(pa.string()) if pa.types.is_dictionary(chunk.type) else chunk
        encoded = plain.dictionary_encode(null_encoding="encode")
        numbers = [self._code(name) for name in encoded.dictionary.to_pylist()]
        codes_n: Ints = np.asarray(numbers, np.int64)[encoded.indices.to_numpy()]
        return codes_n

    def _code(self, name: str | None) -> int:
        if name not in self._codes:
            self._codes[name] = len(self._names)
            self._names.append(name)
        return self._codes[name]


def _read_raw(keys: _Keys, rows: pa.Table) -> Buckets:
    metrics = metrics_of(keys.table, rows.schema)
    return lifted(
        rows.column("step").to_numpy(), keys.codes(rows), metrics, [rows.column(name) for name in metrics]
    )


def _read_coarse(keys: _Keys, rows: pa.Table) -> Buckets:
    names = set(rows.column_names)
    metrics = [
        metric
        for name in rows.column_names
        if (metric := name.removesuffix("_nonfinite")) != name
        and all(f"{metric}_{statistic}" in names for statistic in STATISTICS)
    ]
    return Buckets.of(
        rows.column("step").to_numpy(),
        keys.codes(rows),
        metrics,
        {statistic: [rows.column(f"{metric}_{statistic}") for metric in metrics] for statistic in STATISTICS},
    )


def _to_arrow(keys: _Keys, buckets: Buckets, resolution: int) -> pa.Table:
    own = metrics_of(keys.table)
    scalars = [metric for metric in buckets.metrics if metric not in own]
    schema = coarse_schema(keys.table, scalars, resolution=resolution)
    columns = dict(zip(KEYS[keys.table], keys.columns(buckets.key_n), strict=True))
    columns["step"] = pa.array(buckets.step_n)
    for metric in buckets.metrics:
        for statistic in STATISTICS:
            name = f"{metric}_{statistic}"
            columns[name] = buckets.column(metric, statistic, schema.field(name).type)
    fields = [one for one in schema if one.name in columns]
    return pa.table([columns[one.name] for one in fields], schema=pa.schema(fields))


def _statistics(metric: str, type_: pa.DataType, unit: str, meaning: str, span: str) -> list[pa.Field]:
    of = f"{metric} ({meaning})" if meaning else metric
    mean = type_ if pa.types.is_floating(type_) else pa.float32()
    described = (
        ("min", type_, unit, f"smallest finite value of {of} over {span}"),
        ("max", type_, unit, f"largest finite value of {of} over {span}"),
        ("mean", mean, unit, f"mean of the finite values of {of} over {span}"),
        ("last", type_, unit, f"last value of {of} within {span}"),
        ("count", pa.int32(), "values", f"finite values of {of} over {span}"),
        ("nonfinite", pa.int32(), "values", f"values of {of} over {span} that are NaN or infinite"),
    )
    return [
        pa.field(f"{metric}_{name}", kind, metadata={"unit": its_unit, "meaning": its_meaning})
        for name, kind, its_unit, its_meaning in described
    ]


def _is_scalar(one: pa.Field) -> bool:
    if pa.types.is_floating(one.type):
        return True
    return pa.types.is_integer(one.type) and not (one.name in _WRITER and one.type == pa.int16())
