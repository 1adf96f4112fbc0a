"""Merged part files: how one is told from a part that a recorder wrote, and which parts it stands for.

Merging cannot replace several files by one in a single step of the file system, so for a moment, or after a
kill for good, the merged file lies beside those it was made of. It therefore carries their names in its
Parquet metadata, and a reader leaves out every part that a merged file names. The name says that a file is
merged, so that a directory without any is read without opening a file more. Part names must never be used
twice in a run: a new part under a replaced name would count as replaced.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

REPLACES_KEY = b"diagnostics.replaces"
_MARK = "m"


def merged_name(first_step: int, last_step: int, number: str, generation: int) -> str:
    """Name of a merged part: a part's name whose number ends in `m<generation>`.

    Args:
        first_step: smallest step in the file.
        last_step: largest step in the file.
        number: the number of the last part it replaces, without a generation.
        generation: how often the oldest rows in it have been merged; makes the name unlike any it replaces.
    """
    return f"part-{first_step:012d}-{last_step:012d}-{number}{_MARK}{generation}.parquet"


def generation(name: str) -> int:
    """How often a part's rows have been merged; 0 for a part as a recorder wrote it."""
    _, _, count = name.removesuffix(".parquet").rpartition("-")[2].partition(_MARK)
    return int(count) if count.isdigit() else 0


def number(name: str) -> str:
    """The number in a part's name, without a generation."""
    return name.removesuffix(".parquet").rpartition("-")[2].partition(_MARK)[0]


def replaced_by(path: Path) -> frozenset[str]:
    """Names of the parts that a merged part stands for; none where it cannot be read, as they then still count."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
        names = json.loads(metadata.get(REPLACES_KEY, b"[]"))
    except (pa.ArrowException, OSError, ValueError):
        return frozenset()
    return frozenset(str(name) for name in names) - {path.name}


def without_replaced(paths: Iterable[Path]) -> list[Path]:
    """The paths of one table's parts, in their order, without those that a merged part among them replaces."""
    listed = list(paths)
    replaced = frozenset[str]().union(*(replaced_by(path) for path in listed if generation(path.name)))
    return [path for path in listed if path.name not in replaced]


def merged_parts(folder: Path) -> frozenset[str]:
    """Names of the merged parts in a table's folder now."""
    return (
        frozenset(path.name for path in folder.iterdir() if generation(path.name))
        if folder.is_dir()
        else frozenset()
    )
