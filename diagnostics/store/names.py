"""Which parts and tail files a run directory holds, by their names alone."""

from dataclasses import dataclass
from pathlib import Path

from diagnostics.store.format import COARSE, SCHEMAS, TAIL, PartName
from diagnostics.store.tail.name import TailName

DAMAGED_SUFFIX = ".damaged"
"""Ends the name under which a file that cannot be read whole is kept."""


@dataclass(frozen=True)
class Used:
    """What a rank's file names use already.

    Attributes:
        number: the largest flush number; -1 where there is no file.
        attempts: the attempts.
    """

    number: int
    attempts: frozenset[int]


def used_names(run_dir: Path, rank: int) -> Used:
    """Numbers and attempts among a rank's part files and tail files, coarse and damaged ones included."""
    names: list[PartName | TailName] = [
        part for folder in table_folders(run_dir) for part in parts_in(folder, rank)
    ]
    names += [name for name in tail_in(run_dir, damaged=True) if name.rank == rank]
    return Used(max((name.number for name in names), default=-1), frozenset(name.attempt for name in names))


def holds_rows(run_dir: Path) -> bool:
    """Whether there is a part or a tail file of any rank."""
    return bool(tail_in(run_dir, damaged=True)) or any(parts_in(run_dir / table) for table in SCHEMAS)


def table_folders(run_dir: Path) -> list[Path]:
    """The folders that part files lie in, those of the coarse tables included, whether they exist or not."""
    roots = [run_dir, *_listed(run_dir / COARSE)]
    return [root / table for root in roots for table in SCHEMAS]


def parts_in(folder: Path, rank: int | None = None) -> list[PartName]:
    """The part files in a table's folder (None: of every rank); none where there is no such folder."""
    parsed = [PartName.parse(path.name) for path in _listed(folder)]
    return [part for part in parsed if part is not None and rank in (None, part.rank)]


def tail_in(run_dir: Path, *, damaged: bool = False) -> list[TailName]:
    """The tail files; with `damaged` also by what name damaged ones that were put aside had."""
    names = [path.name for path in _listed(run_dir / TAIL)]
    if damaged:
        names = [name.removesuffix(DAMAGED_SUFFIX) for name in names]
    return [parsed for name in names if (parsed := TailName.parse(name)) is not None]


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []
