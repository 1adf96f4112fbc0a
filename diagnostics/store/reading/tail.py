"""The tail of a run as readers see it: rows of every generation that no part file holds yet."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from diagnostics.store.format import TAIL
from diagnostics.store.names import DAMAGED_SUFFIX
from diagnostics.store.place import Place
from diagnostics.store.tail.decode import Generation, read_generation, read_steps, read_tables
from diagnostics.store.tail.name import TailName

# Holds the first record of any segment whose scalars' names are no novel.
_HEAD_BYTES = 8192


@dataclass(frozen=True)
class TailRows:
    """Rows of one generation of the tail.

    Attributes:
        attempt: who wrote them.
        number: the generation's: that of the flush that makes parts of them.
        tables: rows by table.
        first_step: smallest step of the generation's rows, events apart; None without any.
        pending: steps whose row lacks a scalar that was still on a device.
    """

    attempt: int
    number: int
    tables: Mapping[str, pa.Table]
    first_step: int | None
    pending: frozenset[int] = frozenset()


@dataclass
class Tail:
    """What was in the tail when it was read.

    Attributes:
        generations: the oldest first.
        damage: file name to what is wrong with it.
    """

    generations: list[TailRows] = field(default_factory=list)
    damage: dict[str, str] = field(default_factory=dict)

    @property
    def starts(self) -> list[tuple[int, int]]:
        """Attempt and first step of every generation with steps rows."""
        return [(one.attempt, one.first_step) for one in self.generations if one.first_step is not None]


@dataclass(frozen=True)
class TailFiles:
    """Names of the files of one generation."""

    attempt: int
    number: int
    segments: tuple[str, ...]
    rows_log: str | None

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.segments, *(() if self.rows_log is None else (self.rows_log,)))


def list_tail(run: Place, rank: int, damage: dict[str, str]) -> list[TailFiles]:
    """The generations of a rank that are in the tail now, the oldest first; what is foreign is noted in `damage`."""
    try:
        entries = (run / TAIL).entries()
    except OSError as error:
        damage[TAIL] = str(error)
        return []
    names: dict[tuple[int, int], list[TailName]] = {}
    for entry in entries:
        name = TailName.parse(entry.name.removesuffix(DAMAGED_SUFFIX))
        if name is not None and entry.name.endswith(DAMAGED_SUFFIX):
            if name.rank == rank:
                damage[f"{TAIL}/{entry.name}"] = (
                    "it was put aside when its rows were made parts, as it is damaged"
                )
        elif name is None:
            if entry.name.endswith(".log") and not entry.name.startswith("."):
                damage[f"{TAIL}/{entry.name}"] = "its name is not one that a Recorder gives"
        elif name.rank == rank:
            names.setdefault((name.number, name.attempt), []).append(name)
    return [
        TailFiles(
            attempt,
            number,
            tuple(str(name) for name in sorted(files, key=lambda name: name.index) if name.kind == "steps"),
            next((str(name) for name in files if name.kind == "rows"), None),
        )
        for (number, attempt), files in sorted(names.items())
    ]


def read_tail(run: Place, rank: int, *, steps: bool) -> Tail:
    """The tail of one rank.

    Args:
        run: the run directory.
        rank: the rank.
        steps: whether the steps rows are wanted; otherwise of each generation only its `first_step` is found out.
    """
    tail = Tail()
    gone: set[str] = set()
    for files in list_tail(run, rank, tail.damage):
        tail.generations.append(_read(run / TAIL, files, gone, steps=steps, damage=tail.damage))
    if gone:
        for files in list_tail(run, rank, tail.damage):
            for name in gone.intersection(files.names):
                tail.damage[f"{TAIL}/{name}"] = "it is a link to a file that is not there"
    return tail


def read_bytes(file: Place, start: int = 0) -> bytes | str | None:
    """A tail file's bytes from `start` on; None where it is gone, words where it cannot be read."""
    try:
        return file.read_bytes(start)
    except FileNotFoundError:
        return None  # flushed since it was listed
    except OSError as error:
        return str(error)


def _read(
    folder: Place, files: TailFiles, gone: set[str], *, steps: bool, damage: dict[str, str]
) -> TailRows:
    found, wrong = _decode(folder, files, gone, steps=steps)
    if wrong:
        # The writer goes on meanwhile, and its later bytes may have been seen before earlier ones.
        found, wrong = _decode(folder, files, gone, steps=steps)
    damage.update({f"{TAIL}/{name}": why for name, why in wrong.items()})
    # A measured step's rows may be seen where its steps row was not yet.
    firsts = [
        pc.min(rows.column("step")).as_py() for table, rows in found.tables.items() if table != "events"
    ]
    first = min((step for step in firsts if step is not None), default=None)
    return TailRows(files.attempt, files.number, found.tables, first, frozenset(found.pending))


def _decode(
    folder: Place, files: TailFiles, gone: set[str], *, steps: bool
) -> tuple[Generation, dict[str, str]]:
    """The rows in a generation's files, and what is wrong with which of them; those not there go to `gone`."""
    segments: list[bytes] = []
    log = b""
    wrong: dict[str, str] = {}
    # Backwards: what is put on record meanwhile goes to the last file, and must not be seen without what was before.
    for name in reversed(files.names):
        data = read_bytes(folder / name)
        if data is None:
            gone.add(name)
        elif isinstance(data, str):
            wrong[name] = data
        elif name == files.rows_log:
            log = data
        elif not steps and read_steps(data[:_HEAD_BYTES]).rows:
            segments = [data[:_HEAD_BYTES]]
        else:
            segments.insert(0, data)
    found = read_generation(segments, log)
    if found.damage:
        wrong |= {name: why for name in files.names if (why := _damage(folder, files, name)) is not None}
    return found, wrong


def _damage(folder: Place, files: TailFiles, name: str) -> str | None:
    data = read_bytes(folder / name)
    if not isinstance(data, bytes):
        return None
    return "; ".join((read_tables if name == files.rows_log else read_steps)(data).damage) or None
