"""Merged part files: how one is told from a part that a recorder wrote, and which parts it stands for.

Merging cannot replace several files by one in a single step of the file system, so for a moment, or after a
kill for good, the merged file lies beside those it was made of. It therefore carries their names in its
Parquet metadata, and a reader leaves out every part that a merged file names. File names say which parts a
merged one could stand for, so that its metadata is read only where one of those is still there. Part names must
never be used twice in a run: a new part under a replaced name would count as replaced.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diagnostics.store.format import PartName

REPLACES_KEY = b"diagnostics.replaces"


def may_replace(merged: PartName, part: PartName) -> bool:
    """Whether, by their names, a merged part can stand for another part of its folder."""
    return (
        merged.merges > part.merges
        and (merged.attempt, merged.rank) == (part.attempt, part.rank)
        and merged.first_step <= part.first_step
        and merged.last_step >= part.last_step
    )


def replaced_by(path: Path) -> frozenset[str]:
    """Names of the parts that a merged part stands for; none where it cannot be read, as they then still count."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        names = json.loads(metadata.get(REPLACES_KEY, b"[]"))
    except (pa.ArrowException, OSError, ValueError):
        return frozenset()
    listed = names if isinstance(names, list) else []
    return frozenset(str(name) for name in listed) - {path.name}


def without_replaced(paths: Iterable[Path]) -> list[Path]:
    """One table's parts, in their order, without those that a merged part among them replaces."""
    listed = [(path, PartName.parse(path.name)) for path in paths]
    replaced: set[str] = set()
    for path, merged in listed:
        if merged is not None and any(part is not None and may_replace(merged, part) for _, part in listed):
            replaced |= replaced_by(path)
    return [path for path, _ in listed if path.name not in replaced]
