"""Which files of a spool have yet to be uploaded, and which objects they make superfluous. Asks no store.

Part files never change once they have their names, so that a name and a size say whether a file is up. What is
up and no longer in the spool was merged into a larger part there, or it was recorded elsewhere, or uploaded and
cleared away earlier: only the first kind may be removed.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

import pyarrow.parquet as pq

from diagnostics.store.format import COARSE, TABLES, PartName
from diagnostics.store.parts.merged import REPLACES_KEY, may_replace
from diagnostics.store.place import place

# Alerts are news. Steps decide which attempt's rows are shown, so that they go before what they govern.
_URGENCY = {table: rank for rank, table in enumerate(dict.fromkeys(("events", "steps", *TABLES)))}

_Writer = tuple[str, int, int]
"""Folder, attempt and rank."""


@dataclass(frozen=True)
class Upload:
    """One part file to upload, or one that is up and whose predecessors are too.

    Attributes:
        name: relative to the run, with `/`.
        is_up: whether only its predecessors are left to be removed.
        replaces: uploaded parts whose rows it holds, by name: to be removed once it is up.
        untold: names, in its folder, of those that its own metadata does not name, as they were merged twice
            while nothing could be uploaded.
    """

    name: str
    is_up: bool
    replaces: frozenset[str]
    untold: frozenset[str]


def parts_of(spool: Path, rank: int | None = None) -> dict[str, int]:
    """Size in bytes of every complete part in a run directory, by name relative to it.

    Args:
        spool: the run directory.
        rank: whose parts; None: all ranks'.
    """
    run = place(spool)
    return {
        f"{folder}/{entry.name}": entry.size
        for folder in _folders(spool)
        for entry in (run / folder).entries()
        if (part := _parsed(entry.name)) is not None and rank in (None, part.rank)
    }


def folder_times(spool: Path) -> dict[str, int]:
    """When each folder of parts changed last, ns since 1970: the cheap way to see that nothing is new."""
    return {folder: (spool / folder).stat().st_mtime_ns for folder in _folders(spool)}


def _folders(spool: Path) -> list[str]:
    coarse = [f"{COARSE}/{each.name}/{table}" for each in place(spool / COARSE).entries() for table in TABLES]
    return [folder for folder in (*TABLES, *coarse) if (spool / folder).is_dir()]


def waiting(
    local: Mapping[str, int], up: Mapping[str, int], told_by: Callable[[str], frozenset[str]]
) -> list[Upload]:
    """What is left to do, in the order in which it should be done.

    Args:
        local: the spool's parts, name to size.
        up: what is uploaded, name to size.
        told_by: names, in its folder, of the parts that a merged part's metadata says it stands for.
    """
    merged = [name for name in local if part_of(name).merges]
    told = {name: told_by(name) for name in merged}
    superseded = {f"{_folder(name)}/{each}" for name, names in told.items() for each in names}
    # In the order of their numbers, those of one writer and folder together.
    holders: dict[_Writer, list[str]] = {}
    for name in sorted(merged, key=lambda name: part_of(name).number):
        holders.setdefault(_writer(name, part_of(name)), []).append(name)
    absorbed: dict[str, set[str]] = {}
    for name in up.keys() - local.keys():
        part = _parsed(_last(name))
        holder = None if part is None else _holder(part, holders.get(_writer(name, part), ()))
        if holder is not None:
            absorbed.setdefault(holder, set()).add(_last(name))
    found = []
    for name in sorted(local.keys() - superseded, key=_order):
        folder, direct = _folder(name), told.get(name, frozenset())
        untold = frozenset(absorbed.get(name, ())) - direct
        replaces = frozenset(there for each in direct | untold if (there := f"{folder}/{each}") in up)
        is_up = up.get(name) == local[name]
        if replaces or not is_up:
            found.append(Upload(name, is_up, replaces, untold))
    return found


def part_of(name: str) -> PartName:
    """What the name of a part, relative to its run, says."""
    part = _parsed(_last(name))
    assert part is not None
    return part


# A long run has thousands of names, which are looked at again each time that there is a new one.
@lru_cache(maxsize=2**16)
def _parsed(name: str) -> PartName | None:
    return PartName.parse(name)


def write_retold(source: Path, untold: Iterable[str], sink: IO[bytes]) -> None:
    """Copies a merged part, with more names added to those that it stands for.

    Raises:
        FileNotFoundError: it is gone.
        pyarrow.ArrowException: it is damaged.
    """
    with source.open("rb") as file, pq.ParquetFile(file, page_checksum_verification=True) as part:
        schema = part.schema_arrow
        metadata = dict(schema.metadata or {})
        names = {*json.loads(metadata.get(REPLACES_KEY, b"[]")), *untold}
        metadata[REPLACES_KEY] = json.dumps(sorted(names)).encode()
        with pq.ParquetWriter(
            sink, schema.with_metadata(metadata), compression="zstd", write_page_checksum=True
        ) as writer:
            for group in range(part.num_row_groups):
                rows = part.read_row_group(group)
                writer.write_table(rows.replace_schema_metadata(metadata), row_group_size=len(rows))


def _holder(part: PartName, merged: Iterable[str]) -> str | None:
    """The part that an uploaded one was merged into; `merged` are its writer's, in the order of their numbers.

    Parts are merged oldest first, so that it is the first one numbered like it or higher whose steps include its own.
    """
    return next(
        (
            name
            for name in merged
            if (other := part_of(name)).number >= part.number and may_replace(other, part)
        ),
        None,
    )


def _writer(name: str, part: PartName) -> _Writer:
    return _folder(name), part.attempt, part.rank


def _order(name: str) -> tuple[bool, bool, int, int, str]:
    folder = _folder(name)
    is_coarse = name.startswith(f"{COARSE}/")
    return is_coarse, folder != "events", part_of(name).number, _URGENCY.get(folder, 0), name


def _folder(name: str) -> str:
    return name.rpartition("/")[0]


def _last(name: str) -> str:
    return name.rpartition("/")[2]
