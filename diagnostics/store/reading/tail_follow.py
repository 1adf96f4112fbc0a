"""The tail read bit by bit: of every file only what was added since it was read last."""

from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from diagnostics.store.format import TAIL
from diagnostics.store.place import Place
from diagnostics.store.reading.tail import TailFiles, list_tail, read_bytes
from diagnostics.store.tail.decode import (
    Row,
    TailSteps,
    TailTables,
    read_steps,
    read_tables,
    scalar_names,
    steps_table,
)

Key = tuple[int, int]
"""Number and attempt of a generation."""


@dataclass
class _Position:
    """How far a file was read, and the names of scalars that it declared so far."""

    end: int = 0
    names: dict[int, list[str]] = field(default_factory=dict)


@dataclass
class Followed:
    """One generation of the tail as far as it was read.

    Attributes:
        attempt: who wrote it.
        first_step: smallest step of its rows, events apart; None without any.
        tables: rows that were not taken yet, of any table but `steps`.
        steps: steps rows that were not taken yet, by step.
        waiting: those of them that lack a scalar which lies on a device.
        early: completed steps rows whose record was not met yet.
        has_segments: whether there are records to be met.
        taken_from: smallest step that was taken; None before any.
        positions: how far each file was read.
    """

    attempt: int
    first_step: int | None = None
    tables: list[pa.Table] = field(default_factory=list)
    steps: dict[int, Row] = field(default_factory=dict)
    waiting: set[int] = field(default_factory=set)
    early: dict[int, Row] = field(default_factory=dict)
    has_segments: bool = False
    taken_from: int | None = None
    positions: dict[str, _Position] = field(default_factory=dict)

    def complete(self, *, alive: bool) -> list[Row]:
        """The steps rows, in their order, up to the first that the writer will still complete.

        Args:
            alive: whether the writer still may; otherwise all rows are as complete as they will be.
        """
        rows = {**self.steps, **({} if alive and self.has_segments else self.early)}
        ready: list[Row] = []
        for step in sorted(rows):
            if alive and step in self.waiting:
                break
            ready.append(rows[step])
        return ready

    def taken(self, rows: list[Row]) -> None:
        """Forgets rows that were handed on: these steps rows, and all others."""
        self.tables = []
        for row in rows:
            self.steps.pop(row["step"], None)
            self.early.pop(row["step"], None)
            self.waiting.discard(row["step"])

    def void(self) -> None:
        """Forgets all rows: a part file has them, or nobody wants them."""
        self.tables, self.steps, self.waiting, self.early = [], {}, set(), {}


class TailFollower:
    """Follows the tail of one rank for one table; `generations` is what was read and not taken.

    Args:
        run: the run directory.
        rank: the rank.
        table: the table whose rows are wanted.
        note: told of damage: a file's name in the run directory, and what is wrong with it.
    """

    def __init__(self, run: Place, rank: int, table: str, note: Callable[[str, str], None]) -> None:
        self._run = run
        self._rank = rank
        self._table = table
        self._note = note
        self.generations: dict[Key, Followed] = {}

    @property
    def starts(self) -> list[tuple[int, int]]:
        """Attempt and first step of every generation with rows."""
        return [
            (one.attempt, one.first_step) for one in self.generations.values() if one.first_step is not None
        ]

    def read_on(self) -> None:
        """Reads what was added; a generation whose files are gone is in part files, and goes."""
        damage: dict[str, str] = {}
        listed = {(files.number, files.attempt): files for files in list_tail(self._run, self._rank, damage)}
        for name, why in damage.items():
            self._note(name, why)
        self.generations = {
            key: self.generations.get(key, Followed(files.attempt)) for key, files in listed.items()
        }
        for key, files in listed.items():
            self._read_generation(files, self.generations[key])

    def _read_generation(self, files: TailFiles, followed: Followed) -> None:
        followed.has_segments |= bool(files.segments)
        # Backwards: what is put on record meanwhile goes to the last segment, and must not be seen without what
        # was before; and a step is on record before the rows that complete it.
        wants_steps = self._table == "steps" or followed.first_step is None
        if files.rows_log is not None:
            self._read_log(files.rows_log, followed)
        if wants_steps:
            for name in reversed(files.segments):
                self._read_segment(name, followed)

    def _read_segment(self, name: str, followed: Followed) -> None:
        at = followed.positions.setdefault(name, _Position())

        def decode(data: bytes) -> TailSteps:
            return read_steps(data, whole=at.end == 0, names=at.names)

        found = self._decoded(name, at, decode)
        if not isinstance(found, TailSteps) or not found.rows:
            return
        _see(followed, min(row["step"] for row in found.rows))
        if self._table == "steps":
            for row in found.rows:
                step = row["step"]
                completed = followed.early.pop(step, None)
                followed.steps[step] = row if completed is None else completed
                if completed is None and step in found.pending:
                    followed.waiting.add(step)

    def _read_log(self, name: str, followed: Followed) -> None:
        at = followed.positions.setdefault(name, _Position())

        def decode(data: bytes) -> TailTables:
            return read_tables(data, whole=at.end == 0)

        found = self._decoded(name, at, decode)
        if not isinstance(found, TailTables):
            return
        for table, rows in found.batches:
            if table != "events" and rows.num_rows:
                _see(followed, int(pc.min(rows.column("step")).as_py()))
            if table != self._table:
                continue
            if table != "steps":
                followed.tables.append(rows)
                continue
            for row in rows.to_pylist():
                step = row["step"]
                (followed.steps if step in followed.steps else followed.early)[step] = row
                followed.waiting.discard(step)

    def _decoded(
        self, name: str, at: _Position, decode: Callable[[bytes], TailSteps | TailTables]
    ) -> TailSteps | TailTables | None:
        """What was added to a file, decoded; moves the position on."""
        file = self._run / TAIL / name
        found = None
        # Twice, where need be: later bytes of a writer that goes on may be seen before earlier ones.
        for _ in range(2):
            data = read_bytes(file, at.end)
            if isinstance(data, str):
                self._note(f"{TAIL}/{name}", data)
                return None
            if not data:
                return None
            found = decode(data)
            if not found.damage:
                break
        if found is not None:
            if found.damage:
                self._note(f"{TAIL}/{name}", "; ".join(found.damage))
            at.end += found.end
        return found


def _see(followed: Followed, step: int) -> None:
    followed.first_step = step if followed.first_step is None else min(step, followed.first_step)


def steps_rows(rows: list[Row]) -> pa.Table:
    """Steps rows in Arrow, with every scalar that any of them has."""
    return steps_table(rows, scalar_names(rows))
