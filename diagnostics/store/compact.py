"""`compact_run`: merges a run's small part files into larger ones, beside its writer and its readers.

Each merge: write the new file under a temporary name, fsync, rename, then remove the parts it names in its
metadata (see merged.py). Killed at any point, the run reads the same as before; the next call finishes what
was left. The writer is not disturbed: it only ever adds files, complete by the time they carry a part's name.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import SCHEMAS, TEMPORARY_SUFFIX, part_steps
from diagnostics.store.manifest import read_manifest
from diagnostics.store.merged import (
    REPLACES_KEY,
    generation,
    merged_name,
    number,
    replaced_by,
    without_replaced,
)

# Large enough that opening files costs nothing beside reading them, small enough to be held in memory whole.
TARGET_BYTES = 32 * 2**20
_TEMPORARY_PREFIX = ".compact-"


@dataclass
class Compaction:
    """What `compact_run` did.

    Attributes:
        files: part files before and after, by table.
        damaged: parts that cannot be read, which were left as they are, and why.
    """

    files: dict[str, tuple[int, int]] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)


def compact_run(run_dir: str | os.PathLike[str], *, target_bytes: int = TARGET_BYTES) -> Compaction:
    """Merges the small part files of every table into files of about `target_bytes`.

    Args:
        run_dir: the run, live or ended.
        target_bytes: a part of at least half this size is left alone, and no merge begins that would exceed it.

    Raises:
        NotARunError: the path holds no run.
        DiagnosticsError: another process is compacting this run.
    """
    path = Path(run_dir)
    read_manifest(path)
    result = Compaction()
    with _alone(path):
        for table in SCHEMAS:
            folder = path / table
            if folder.is_dir():
                _finish_interrupted(folder)
                _compact_table(folder, target_bytes, result)
    return result


@contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """Holds the run against a second compaction, which would merge the same rows twice; a kill lets go of it."""
    try:
        import fcntl  # noqa: PLC0415 - absent on Windows, where all else here works
    except ModuleNotFoundError:
        raise DiagnosticsError(
            "compact needs file locks of a POSIX system, which this one does not have"
        ) from None
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DiagnosticsError(
                f"another process is compacting {run_dir}; wait until it has ended"
            ) from None
        yield
    finally:
        os.close(descriptor)


def _finish_interrupted(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        path.unlink()
    for path in _parts(folder):
        leftovers = [left for name in sorted(replaced_by(path)) if (left := folder / name).exists()]
        if leftovers and _damage(path) is None:
            for left in leftovers:
                left.unlink()


def _compact_table(folder: Path, target_bytes: int, result: Compaction) -> None:
    paths = without_replaced(_parts(folder))
    small = []
    for path in paths:
        if 2 * path.stat().st_size >= target_bytes:
            continue
        damage = _damage(path)
        if damage is None:
            small.append(path)
        else:
            result.damaged[str(path)] = damage
    after = len(paths)
    for group in _groups(small, target_bytes):
        if _merge(group):
            after -= len(group) - 1
    result.files[folder.name] = (len(paths), after)


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if part_steps(path.name) is not None)


def _damage(path: Path) -> str | None:
    """Why a part cannot be merged, or None; reads it whole, since a footer says nothing about the pages."""
    try:
        _read(path)
    except (pa.ArrowException, OSError) as error:
        return str(error)
    return None


def _read(path: Path) -> pa.Table:
    schema = SCHEMAS[path.parent.name]
    with pq.ParquetFile(path) as file:
        part = file.read()
    names = part.column_names
    if "step" not in names:
        raise pa.ArrowInvalid("it has no column 'step'")
    return part.cast(
        pa.schema([schema.field(n) if n in schema.names else part.schema.field(n) for n in names])
    )


def _groups(paths: Sequence[Path], target_bytes: int) -> list[list[Path]]:
    """Small parts in step order, cut where a file would grow past the target; groups of one are left out."""
    groups: list[list[Path]] = [[]]
    size = 0
    for path in paths:
        length = path.stat().st_size
        if size + length > target_bytes:
            groups.append([])
            size = 0
        groups[-1].append(path)
        size += length
    return [group for group in groups if len(group) > 1]


def _merge(paths: Sequence[Path]) -> bool:
    """Merges the parts into one; False where their columns do not fit together, which a reader meets as well."""
    try:
        table = pa.concat_tables([_read(path) for path in paths], promote_options="default")
    except pa.ArrowException:
        return False
    ranges = [steps for path in paths if (steps := part_steps(path.name)) is not None]
    first, last = min(first for first, _ in ranges), max(last for _, last in ranges)
    folder, round_ = paths[0].parent, 1 + max(generation(path.name) for path in paths)
    while (target := folder / merged_name(first, last, number(paths[-1].name), round_)).exists():
        round_ += 1
    replaces = json.dumps([path.name for path in paths]).encode()
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), REPLACES_KEY: replaces})
    temporary = folder / f"{_TEMPORARY_PREFIX}{os.getpid()}{TEMPORARY_SUFFIX}"
    with temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(target)
    _fsync_folder(folder)
    for path in paths:
        path.unlink()
    return True


def _fsync_folder(folder: Path) -> None:
    """Makes the new name last before the old ones go: after a power cut both gone would be the rows gone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
