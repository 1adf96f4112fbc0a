"""Writing the tables of a run: rows become Arrow and lie in the tail at once, and in part files at the next flush.

A part file is written under a temporary name, synced and renamed: a reader or a kill meets a complete file or
none. The rows log of the tail goes once all its rows are in parts; see format.py for what holds in between.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, Protocol

import pyarrow as pa

from diagnostics.store.coarse.tables import CoarseWriter
from diagnostics.store.format import SCHEMAS, TAIL, PartName
from diagnostics.store.parts.file import write_part
from diagnostics.store.tail.decode import Row, scalar_names, steps_schema, steps_table
from diagnostics.store.tail.frames import MAGIC, table_frame
from diagnostics.store.tail.name import TailName

P = ParamSpec("P")

COARSE_CULPRIT = "the writing of coarse tables"
_LEAST_BUCKETS = 32


def _directly(_: str, function: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> bool:
    function(*args, **kwargs)
    return True


class _RowsLog:
    """One generation's rows of the tables of measured steps and events; there is no file before its first row."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1
        self._end = 0

    def append(self, frame: bytes) -> None:
        if self._file < 0:
            self._path.parent.mkdir(exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        if not self._end:
            frame = MAGIC + frame
        left = memoryview(frame)
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            # A frame after half a frame would make that one damage.
            with suppress(OSError):
                os.ftruncate(self._file, self._end)
            raise
        self._end += len(frame)

    def remove(self) -> None:
        if self._file >= 0:
            self.close()
            self._path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Removable(Protocol):
    """A file of the tail."""

    def remove(self) -> None: ...
    def close(self) -> None: ...


@dataclass
class Flush:
    """Rows on their way into part files.

    Attributes:
        number: of the flush.
        logs: the rows logs that hold them meanwhile.
        segments: the step segments that do.
        tables: the rows; those of a table that was written are taken out.
    """

    number: int
    logs: list[Removable]
    segments: list[Removable]
    tables: dict[str, pa.Table] = field(default_factory=dict)


class PartWriter:
    """Keeps the rows of one attempt and writes them as part files; single-threaded, knows no queue.

    Args:
        run_dir: the run directory; folders in it are made as needed.
        attempt: which attempt at the run this is, counted from 1.
        rank: rank of the process in a distributed job.
        number: number of the first flush.
        every: steps between two measured ones; None: no coarse tables are written.
        contained_for: runs code of a named culprit; False where it failed.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        attempt: int = 1,
        rank: int = 0,
        number: int = 0,
        every: int | None = None,
        contained_for: Callable[..., bool] = _directly,
    ) -> None:
        self.number = number
        self._run_dir = run_dir
        self._attempt, self._rank = attempt, rank
        self._kept: dict[str, list[pa.Table]] = {table: [] for table in SCHEMAS}
        # A scalar once seen keeps its column in every later part, so that globbing readers agree on columns.
        self._scalars: list[str] = []
        self._contained_for = contained_for
        self._coarse = (
            None if every is None else CoarseWriter(run_dir, attempt=attempt, rank=rank, every=every)
        )
        self._log = self._new_log()
        self._unfinished: Flush | None = None

    def add(self, table: str, rows: Sequence[Row]) -> None:
        """Takes rows; once this returns they lie in the tail.

        Raises:
            OSError: the tail cannot be written; the rows are kept for the next flush.
        """
        if rows:
            arrow = self._to_arrow(table, rows)
            self._kept[table].append(arrow)
            self._log.append(table_frame(table, arrow))

    def add_logged_steps(self, rows: Sequence[Row], completed: Sequence[Row] = ()) -> None:
        """Takes rows of the table `steps` that lie in the tail already.

        Args:
            rows: the rows.
            completed: those of them whose record in the tail lacks a scalar; they are put there as they are now.

        Raises:
            OSError: the tail cannot be written; the rows are kept for the next flush.
        """
        if rows:
            self._kept["steps"].append(self._to_arrow("steps", rows))
        if completed:
            self._log.append(table_frame("steps", self._to_arrow("steps", completed)))

    @property
    def pending(self) -> int:
        """Rows that are in no flush yet."""
        return sum(batch.num_rows for batches in self._kept.values() for batch in batches)

    @property
    def unfinished(self) -> bool:
        """Whether a flush failed for some table."""
        return self._unfinished is not None

    def begin_flush(self) -> Flush:
        """Takes all rows so far, and those of a flush that failed, for part files of the current number.

        Rows that come from now on are of the next. One flush at a time: `write` it before the next begins.
        """
        before, self._unfinished = self._unfinished, None
        flush = Flush(self.number, logs=[self._log], segments=[])
        for table, batches in self._kept.items():
            if before is not None and table in before.tables:
                batches.insert(0, before.tables[table])
            if batches:
                flush.tables[table] = self._together(table, batches)
                self._kept[table] = []
        if before is not None:
            flush.logs += before.logs
            flush.segments += before.segments
        self.number += 1
        self._log = self._new_log()
        return flush

    def write(self, flush: Flush, *, last: bool = False) -> None:
        """Writes the part files of a flush and removes what held its rows in the tail; callable from any thread.

        Args:
            flush: as `begin_flush` gave it.
            last: whether no other is expected: coarse tables then do not wait for more buckets.

        Raises:
            OSError: a file could not be written; the rows of that table are in the next flush.
        """
        failures: list[OSError | pa.ArrowException] = []
        written: dict[str, pa.Table] = {}
        for table, rows in flush.tables.items():
            try:
                self._write_part(table, rows, flush.number)
                written[table] = rows
            except (OSError, pa.ArrowException) as error:
                failures.append(error)
        for table in written:
            del flush.tables[table]
        if self._coarse is not None:
            self._contained_for(
                COARSE_CULPRIT,
                self._write_coarse,
                self._coarse,
                written,
                flush.number,
                1 if last else _LEAST_BUCKETS,
                failures,
            )
        if flush.tables:
            self._unfinished = flush
        else:
            for one in (*flush.logs, *flush.segments):
                one.remove()
        if failures:
            raise failures[0]

    def flush(self) -> None:
        """Writes every row taken so far to part files.

        Raises:
            OSError: a file could not be written; the rows of that table are kept for the next flush.
        """
        self.write(self.begin_flush(), last=True)

    def close(self) -> None:
        """Lets the files of the tail go; those whose rows are in no part stay."""
        self._log.close()
        for one in () if self._unfinished is None else (*self._unfinished.logs, *self._unfinished.segments):
            one.close()

    def _new_log(self) -> "_RowsLog":
        return _RowsLog(self._run_dir / TAIL / str(TailName("rows", self.number, self._attempt, self._rank)))

    def _to_arrow(self, table: str, rows: Sequence[Row]) -> pa.Table:
        if table == "steps":
            self._scalars += [name for name in scalar_names(rows) if name not in self._scalars]
            return steps_table(rows, self._scalars)
        return pa.Table.from_pylist(list(rows), schema=SCHEMAS[table])

    def _together(self, table: str, batches: Sequence[pa.Table]) -> pa.Table:
        """One table of all batches, with every column that a part of it has."""
        schema = steps_schema(self._scalars) if table == "steps" else SCHEMAS[table]
        rows = pa.concat_tables([*batches, schema.empty_table()], promote_options="default").select(
            schema.names
        )
        return rows.replace_schema_metadata(None)

    def _write_part(self, table: str, rows: pa.Table, number: int) -> None:
        steps = rows.column("step").to_numpy()
        name = PartName(int(steps.min()), int(steps.max()), number, self._attempt, self._rank)
        write_part(self._run_dir / table, name, rows)

    @staticmethod
    def _write_coarse(
        coarse: CoarseWriter,
        written: Mapping[str, pa.Table],
        number: int,
        least: int,
        failures: list[OSError | pa.ArrowException],
    ) -> None:
        for table, rows in written.items():
            coarse.take(table, rows)
        try:
            coarse.write(number, least=least)
        except OSError as error:
            failures.append(error)  # the disk's fault, which is told as such and once
