"""`Run.coarse`: a table's course over many steps, from stored coarse tables where there are any.

A stored bucket serves where it is whole in the view. What is missing (the bucket that is still open, buckets that a
later attempt cuts, runs that have no coarse tables, damaged files) is made of finer stored buckets, and those of
rows, by the code that the writer uses.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from diagnostics.errors import DiagnosticsError
from diagnostics.store.coarse.tables import KEYS, STATISTICS, aggregate, coarse_schema, metrics_of
from diagnostics.store.format import COARSE, RESOLUTIONS
from diagnostics.store.parts.read import Wanted
from diagnostics.store.reading.asked import check_columns, check_table
from diagnostics.store.reading.files import RunFiles
from diagnostics.store.reading.spans import Spans
from diagnostics.store.reading.step_order import in_step_order, spelled_out
from diagnostics.store.reading.view import View

_COUNTS = ("count", "nonfinite")


class CoarseReader:
    """Reads one coarse table; see `Run.coarse` for the arguments.

    Args:
        files: the run's files.
        table: the table.
        columns: columns of the result (None: all).
        equal: value that a key column must have.
        all_columns: every column of the table itself that any file has.

    Raises:
        DiagnosticsError: the table has no coarse ones, or no such column.
    """

    def __init__(
        self,
        files: RunFiles,
        table: str,
        columns: Sequence[str] | None,
        equal: dict[str, str | int],
        all_columns: Callable[[str], pa.Schema],
    ) -> None:
        check_table(table)
        if table not in KEYS:
            raise DiagnosticsError(f"table {table!r} has no coarse tables; {', '.join(KEYS)} have them")
        check_columns(columns)
        self._files = files
        self._table = table
        self._keys = ("step", *KEYS[table])
        self._columns = columns
        self._equal = equal
        self._metrics = None if columns is None else self._checked(columns, all_columns)

    def read(self, resolution: int, start_step: int | None, end_step: int | None) -> pa.Table:
        """The buckets of `resolution` steps that hold any step of the range, in step order.

        Raises:
            DiagnosticsError: there is no such resolution.
        """
        if resolution not in RESOLUTIONS:
            raise DiagnosticsError(
                f"there is no resolution {resolution!r}; the resolutions are {', '.join(map(str, RESOLUTIONS))} steps"
            )
        while True:
            tail = self._files.tail(steps=self._table == "steps")
            listed, view = self._files.look(self._table, tail.starts)
            spans = [
                (part.name.first_step, last)
                for part in listed.parts
                if view.shows(part.name.attempt)
                and (last := view.last(part.name.attempt, part.name.last_step)) is not None
            ]
            spans += [
                (pc.min(step).as_py(), pc.max(step).as_py())
                for one in tail.generations
                if view.shows(one.attempt) and self._table in one.tables and one.tables[self._table].num_rows
                for step in [one.tables[self._table].column("step")]
            ]
            asked = Spans()
            for first, last in spans:
                low = first if start_step is None else max(first, start_step)
                high = last if end_step is None else min(last, end_step)
                if low <= high:
                    asked.add(low // resolution * resolution, (high // resolution + 1) * resolution - 1)
            buckets = self._buckets(resolution, asked, view)
            if buckets is not None:
                return self._finished(buckets, resolution)

    def _buckets(self, resolution: int, asked: Spans, view: View) -> pa.Table | None:
        """The buckets within the steps asked for; None where an attempt began meanwhile: to be done again."""
        pieces, missing = self._stored(resolution, asked, view)
        finer = next((one for one in self._finer(resolution) if self._stores_any(one, missing, view)), None)
        if finer is not None:
            rows = self._buckets(finer, missing, view)
            if rows is None:
                return None
            pieces.append(aggregate(self._table, rows, resolution, from_resolution=finer))
        else:
            for first, last in missing:
                found, now = self._files.rows(
                    self._table, Wanted(self._raw_columns(), first, last, self._equal)
                )
                if now.starts != view.starts:
                    return None
                pieces += [aggregate(self._table, rows, resolution) for rows in self._together(found)]
        return self._as_one(pieces, resolution)

    def _finer(self, resolution: int) -> list[int]:
        return sorted((one for one in RESOLUTIONS if one < resolution), reverse=True)

    def _stored(self, resolution: int, asked: Spans, view: View) -> tuple[list[pa.Table], Spans]:
        """Stored buckets within the steps asked for; and the steps that none of them stands for."""
        steps = list(asked)
        if not steps:
            return [], Spans()
        folder = f"{COARSE}/{resolution}/{self._table}"
        schema = coarse_schema(self._table)
        wanted = Wanted(self._stored_columns(), steps[0][0], steps[-1][1], self._equal)
        while True:
            listed = self._files.listing(folder)
            covers = {
                part: (part.name.first_step, last)
                for part in listed.without_replaced()
                if (last := self._whole(part.name.attempt, part.name.last_step, resolution, view))
                >= part.name.first_step
            }
            read, gone = self._files.read_parts(folder, schema, [(part, wanted) for part in covers])
            if self._files.is_settled(folder, listed, gone):
                break
        rows_of = dict(read)
        left = Spans(steps)
        pieces = []
        damaged = [covers[part] for part in covers if part not in rows_of and wanted.meets(*covers[part])]
        # The newest first: where a bucket was written twice, as a crash may have it, the later one holds.
        for part in sorted(rows_of, key=lambda part: part.name.number, reverse=True):
            mine = Spans([covers[part]])
            for first, last in damaged:
                mine.remove(first, last)
            rows = rows_of[part]
            step_n = rows.column("step").to_numpy()
            pieces.append(rows.filter(pa.array(mine.holding(step_n) & left.holding(step_n))))
            for first, last in mine:
                left.remove(first, last)
        return pieces, left

    def _stores_any(self, resolution: int, missing: Spans, view: View) -> bool:
        """Whether a resolution may have stored buckets of these steps."""
        steps = list(missing)
        names = [part.name for part in self._files.listing(f"{COARSE}/{resolution}/{self._table}").parts]
        return any(
            name.first_step <= last and self._whole(name.attempt, name.last_step, resolution, view) >= first
            for name in names
            for first, last in steps
        )

    def _whole(self, attempt: int, last_step: int, resolution: int, view: View) -> int:
        """The last step of the last bucket of an attempt that no later attempt cuts; -1 without any."""
        end = view.end(attempt)
        return last_step if end is None else min(last_step, end // resolution * resolution - 1)

    def _together(self, pieces: Sequence[pa.Table]) -> list[pa.Table]:
        """The rows of one stretch as one table, so that no bucket is made of a part of its rows."""
        held = [piece for piece in pieces if piece.num_rows]
        return [in_step_order(pa.concat_tables(held, promote_options="default"))] if held else []

    def _as_one(self, pieces: Sequence[pa.Table], resolution: int) -> pa.Table:
        schema = coarse_schema(self._table, resolution=resolution)
        wanted = self._stored_columns()
        names = schema.names if wanted is None else [name for name in schema.names if name in wanted]
        empty = schema.empty_table().select(names)
        plain = [spelled_out(piece).replace_schema_metadata(None) for piece in pieces if piece.num_rows]
        rows = pa.concat_tables([empty, *plain], promote_options="default")
        for index, name in enumerate(rows.column_names):
            # A scalar that is newer than a stored bucket has no value in it, which is a count of none.
            if name.rpartition("_")[2] in _COUNTS and rows.column(index).null_count:
                rows = rows.set_column(index, rows.schema.field(index), rows.column(index).fill_null(0))
        return rows

    def _finished(self, rows: pa.Table, resolution: int) -> pa.Table:
        for name in KEYS[self._table]:
            if name != "head":
                index = rows.column_names.index(name)
                rows = rows.set_column(index, name, rows.column(name).dictionary_encode())
        rows = spelled_out(in_step_order(rows))
        if self._columns is None:
            return rows
        schema = coarse_schema(self._table, self._metrics or (), resolution=resolution)
        for name in self._columns:
            if name not in rows.column_names:
                kind = schema.field(name).type
                missing = pa.array(np.zeros(rows.num_rows, np.int32)) if kind == pa.int32() else None
                rows = rows.append_column(name, pa.nulls(rows.num_rows, kind) if missing is None else missing)
        return rows.select(list(self._columns))

    def _raw_columns(self) -> list[str] | None:
        if self._metrics is None:
            own = [*self._keys, *metrics_of(self._table)]
            return None if self._table == "steps" else own
        return [*self._keys, *self._metrics]

    def _stored_columns(self) -> list[str] | None:
        if self._metrics is None:
            return None
        return [*self._keys, *(f"{metric}_{name}" for metric in self._metrics for name in STATISTICS)]

    def _checked(self, columns: Sequence[str], all_columns: Callable[[str], pa.Schema]) -> list[str]:
        """The metrics that the columns are of."""
        metrics: dict[str, None] = {}
        known = metrics_of(self._table)
        for column in columns:
            if column in self._keys:
                continue
            metric, _, statistic = column.rpartition("_")
            if statistic in STATISTICS and metric not in known and self._table == "steps":
                known = metrics_of(self._table, all_columns(self._table))
            if statistic not in STATISTICS or metric not in known:
                raise DiagnosticsError(
                    f"the coarse tables of {self._table!r} have no column {column!r}; they have "
                    f"{', '.join(self._keys)}, and of each of {', '.join(known)} those that end in "
                    f"{', '.join('_' + name for name in STATISTICS)}"
                )
            metrics[metric] = None
        return list(metrics)


def resolution_for(points: int, steps: int, apart: int) -> int | None:
    """The finest resolution that shows a run's steps in at most so many buckets; None: its rows are few enough.

    Args:
        points: the most buckets.
        steps: steps of the run.
        apart: steps between two rows.
    """
    if points < 1:
        raise DiagnosticsError(f"points is {points}; a picture has at least one")
    if -(-steps // apart) <= points:
        return None
    return next((one for one in RESOLUTIONS if -(-steps // one) <= points), RESOLUTIONS[-1])
