"""Reading a run directory: `open_run` and `Run`. Works while the run is written; needs no lock."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from diagnostics.errors import DiagnosticsError, NotARunError
from diagnostics.store.coarse.read import CoarseReader, resolution_for
from diagnostics.store.format import MANIFEST, SCHEMAS, TABLES, TAIL, PartName
from diagnostics.store.manifest import Manifest, attempts_of, live_state, read_manifest
from diagnostics.store.parts.read import conform, read_schema, shaped
from diagnostics.store.place import Entry, Place, place
from diagnostics.store.reading.asked import asked, check_table, finished, key_values, to_frame
from diagnostics.store.reading.cursor import Cursor
from diagnostics.store.reading.files import RunFiles
from diagnostics.store.reading.find import find_runs as find_runs  # noqa: PLC0414 - found here by those who read runs
from diagnostics.store.tail.name import TailName

if TYPE_CHECKING:
    import pandas as pd


class Run:
    """One run, read-only.

    Every table method returns a pandas DataFrame in step order and takes the same arguments:

    Args:
        columns: the columns to read, in this order (None: all); others are not read from disk.
        start_step: first step wanted, inclusive (None: from the beginning).
        end_step: last step wanted, inclusive (None: to the end).
        layer, head, parameter: only rows with this value, in tables that have the column.

    Where a run was resumed, each step is shown as the last attempt that recorded it did.

    Raises:
        NotARunError: the path holds no run.
        NewerSchemaError: the run's format is newer than this release.
    """

    def __init__(
        self, path: str | os.PathLike[str] | Place, *, attempt: int | None = None, rank: int = 0
    ) -> None:
        self.place = place(path)
        self.path: Path | str = self.place.local or str(self.place)
        """Where the run lies: a Path on this machine, a URI elsewhere."""
        self._manifest = read_manifest(self.place)
        self.attempt = attempt
        self.rank = rank
        if attempt is not None or rank:
            self._check_writer()
        self.files = RunFiles(self.place, attempt, rank)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @property
    def name(self) -> str:
        return self.place.name if self.place.local is None else self.place.local.resolve().name

    @property
    def damaged(self) -> dict[str, str]:
        """Files that could not be read so far, and why."""
        return self.files.damaged

    @property
    def info(self) -> Manifest:
        """The manifest (`run.json`) as it stands now, with `state` judged: running, stalled, crashed, finished."""
        # The manifest is replaced while the run lives; the last good one serves where it is gone by now.
        try:
            self._manifest = read_manifest(self.place)
        except NotARunError as error:
            self.damaged[MANIFEST] = str(error)
        return {**self._manifest, "state": live_state(self._manifest)}

    @property
    def attempts(self) -> list[int]:
        """The attempts that rows of this rank are on disk of."""
        return sorted({attempt for attempt, rank in self._writers() if rank == self.rank})

    @property
    def ranks(self) -> list[int]:
        """The ranks that rows are on disk of."""
        return sorted({rank for _, rank in self._writers()})

    def steps(
        self,
        columns: Sequence[str] | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        *,
        layer: str | None = None,
        head: int | None = None,
        parameter: str | None = None,
    ) -> "pd.DataFrame":
        """One row per step: loss, lr, grad_norm and the scalars the user handed in."""
        return to_frame(
            self.table("steps", columns, start_step, end_step, layer=layer, head=head, parameter=parameter)
        )

    def attention(
        self,
        columns: Sequence[str] | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        *,
        layer: str | None = None,
        head: int | None = None,
        parameter: str | None = None,
    ) -> "pd.DataFrame":
        """One row per measured step, layer and query head: entropy, max logit, map rank."""
        return to_frame(
            self.table(
                "attention", columns, start_step, end_step, layer=layer, head=head, parameter=parameter
            )
        )

    def spectra(
        self,
        columns: Sequence[str] | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        *,
        layer: str | None = None,
        head: int | None = None,
        parameter: str | None = None,
    ) -> "pd.DataFrame":
        """One row per measured step, layer and query head: spectrum of Wq_h^T Wk_h."""
        return to_frame(
            self.table("spectra", columns, start_step, end_step, layer=layer, head=head, parameter=parameter)
        )

    def updates(
        self,
        columns: Sequence[str] | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        *,
        layer: str | None = None,
        head: int | None = None,
        parameter: str | None = None,
    ) -> "pd.DataFrame":
        """One row per measured step and matrix: size of the step's update against the weight."""
        return to_frame(
            self.table("updates", columns, start_step, end_step, layer=layer, head=head, parameter=parameter)
        )

    def events(
        self,
        columns: Sequence[str] | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        *,
        layer: str | None = None,
        head: int | None = None,
        parameter: str | None = None,
    ) -> "pd.DataFrame":
        """One row per alert, control command, warning or fault."""
        return to_frame(
            self.table("events", columns, start_step, end_step, layer=layer, head=head, parameter=parameter)
        )

    def table(
        self,
        name: str,
        columns: Sequence[str] | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        *,
        layer: str | None = None,
        head: int | None = None,
        parameter: str | None = None,
    ) -> pa.Table:
        """The Arrow table behind the DataFrame of the same name; same arguments."""
        wanted = asked(name, columns, start_step, end_step, layer=layer, head=head, parameter=parameter)
        pieces, _ = self.files.rows(name, wanted)
        return finished(pieces, name, columns, self._schema)

    def follow(self, table: str, columns: Sequence[str] | None = None) -> Cursor:
        """A cursor on a table: each of its reads gives the rows that came since the one before.

        Args:
            table: the table's name.
            columns: the columns to hand out, in this order (None: all).

        Raises:
            DiagnosticsError: there is no such table, or `columns` is empty.
        """
        return Cursor(self.files, table, columns, alive=self._may_be_written, all_columns=self._schema)

    def coarse(
        self,
        table: str,
        resolution: int,
        columns: Sequence[str] | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        *,
        layer: str | None = None,
        head: int | None = None,
        parameter: str | None = None,
    ) -> "pd.DataFrame":
        """A table's course in buckets of many steps: of every metric its extremes, mean and last value in each.

        Args:
            table: `steps`, `attention`, `spectra` or `updates`.
            resolution: steps per bucket: 16, 256 or 4096.
            columns: the columns to read, in this order (None: all).
            start_step: the first bucket is the one that holds this step.
            end_step: the last bucket is the one that holds this step.
            layer: only rows of this layer.
            head: only rows of this head.
            parameter: only rows of this parameter.

        Returns:
            `step` (the bucket's first), layer and head or parameter, and of each metric m of the table: `m_min`,
            `m_max` and `m_mean` of its finite values, of which there are `m_count`; `m_nonfinite`, how many are
            NaN or infinite; `m_last`, the last that is not null. A bucket has a row where the table has one.

        Raises:
            DiagnosticsError: there is no such table, resolution or column.
        """
        check_table(table)
        equal = key_values(table, layer=layer, head=head, parameter=parameter)
        reader = CoarseReader(self.files, table, columns, equal, self._schema)
        return to_frame(reader.read(resolution, start_step, end_step))

    def resolution_for(self, points: int, table: str = "steps") -> int | None:
        """The finest resolution of `coarse` that gives at most so many buckets; None: the rows are few enough.

        Args:
            points: the most buckets; a run too long for it at any resolution gets the coarsest.
            table: the table to be drawn.

        Raises:
            DiagnosticsError: there is no such table, or `points` is less than one.
        """
        check_table(table)
        tail = self.files.tail(steps=table == "steps")
        listed, _ = self.files.look(table, tail.starts)
        firsts = [part.name.first_step for part in listed.parts]
        lasts = [part.name.last_step for part in listed.parts]
        for rows in (one.tables[table] for one in tail.generations if table in one.tables):
            if rows.num_rows:
                lowest, highest = pc.min_max(rows.column("step")).as_py().values()
                firsts.append(lowest)
                lasts.append(highest)
        every = self._manifest.get("every")
        apart = every if table != "steps" and isinstance(every, int) and every > 0 else 1
        steps = max(lasts) - min(firsts) + 1 if firsts else 0
        return resolution_for(points, steps, apart)

    def _may_be_written(self) -> bool:
        return self.info["state"] in ("running", "stalled")

    def _schema(self, table: str) -> pa.Schema:
        """Every column of the table that any file has."""
        found = {one.name: one for one in conform(SCHEMAS[table].empty_table(), SCHEMAS[table]).schema}
        for part in self.files.listing(table).without_replaced():
            try:
                schema = read_schema(part.place.source(), SCHEMAS[table])
            except FileNotFoundError:
                continue
            except (pa.ArrowException, OSError) as error:
                self.files.note(f"{table}/{part.place.name}", str(error))
                continue
            for one in schema:
                found.setdefault(one.name, one)
        for generation in self.files.tail(steps=table == "steps").generations:
            if table in generation.tables:
                for one in shaped(generation.tables[table], SCHEMAS[table]).schema:
                    found.setdefault(one.name, one)
        return pa.schema(found.values())

    def _writers(self) -> set[tuple[int, int]]:
        """Attempt and rank of everything on disk, by the files' names."""
        folders = [self.place / folder for folder in (*TABLES, TAIL)]
        names = [entry.name for folder in folders for entry in _entries(folder)]
        parsed = [PartName.parse(name) or TailName.parse(name) for name in names]
        return {(name.attempt, name.rank) for name in parsed if name is not None}

    def _check_writer(self) -> None:
        writers = self._writers()
        if self.rank and self.rank not in {rank for _, rank in writers}:
            raise DiagnosticsError(
                f"{self.path} holds no rows of rank {self.rank}; it holds {_listed(rank for _, rank in writers)}. "
                "DIAGNOSTICS_RANKS says which ranks record"
            )
        known = {attempt for attempt, rank in writers if rank == self.rank}
        # An attempt that died before its first step has left no file.
        named = [entry.get("attempt") for entry in (self._manifest, *attempts_of(self._manifest))]
        known |= {number for number in named if isinstance(number, int)}
        if self.attempt is not None and self.attempt not in known:
            raise DiagnosticsError(
                f"{self.path} has no attempt {self.attempt}; it has {_listed(known)}. "
                "Leave attempt out for the rows that count"
            )


def open_run(path: str | os.PathLike[str] | Place, *, attempt: int | None = None, rank: int = 0) -> Run:
    """Opens a run for reading, finished or still being written; imports no torch.

    Args:
        path: the directory that a Recorder writes to, or its URI (`s3://bucket/path`, credentials in the environment).
        attempt: of a run that was resumed, the attempt to show whole (counted from 1); None: what counts of all.
        rank: of a distributed job that records several ranks, the one to read.

    Raises:
        NotARunError: the path holds no run.
        NewerSchemaError: the run's format is newer than this release.
        DiagnosticsError: the run has no such attempt or rank.
    """
    return Run(path, attempt=attempt, rank=rank)


def _entries(folder: Place) -> list[Entry]:
    try:
        return folder.entries()
    except OSError:
        return []  # named as damaged when it is read


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(set(numbers)))) or "none"
