"""`compact_run`: as few and as large part files as a run can have, made beside its writer and its readers.

What a dead writer left in the tail becomes parts first. The writer of a live run is not disturbed: it only ever
adds files, complete by the time they carry a part's name. Killed at any point, the run reads the same as before;
the next call finishes what was left.
"""

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import COARSE, TAIL
from diagnostics.store.manifest import read_manifest
from diagnostics.store.parts.folder import Folder, folders
from diagnostics.store.parts.merged import without_replaced
from diagnostics.store.parts.merging import (
    TARGET_BYTES,
    BusyError,
    NoLocksError,
    all_small,
    alone,
    merge_folder,
)
from diagnostics.store.tail.name import TailName
from diagnostics.store.tail.settle import settle

PATIENCE_S = 5.0
"""How long another process that merges the same run is waited for; its writer's own merges end sooner."""


@dataclass
class Compaction:
    """What `compact_run` did.

    Attributes:
        files: files before and after, by table (`steps`), coarse table (`coarse/16/steps`), and of the `tail`.
        damaged: files that cannot be read, which were left as they are, and why.
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
        OSError: a file cannot be written.
    """
    path = Path(run_dir)
    read_manifest(path)
    before = _count(path)
    damaged: dict[Path, str] = {}
    try:
        with alone(path, PATIENCE_S):
            settled = settle(path)
            for folder in folders(path):
                merge_folder(folder, partial(all_small, target_bytes=target_bytes), damaged=damaged)
    except BusyError:
        raise DiagnosticsError(f"another process is compacting {path}; wait until it has ended") from None
    except NoLocksError as error:
        raise DiagnosticsError(
            f"{path} cannot be compacted where it lies ({error}): compact needs file locks, without which two "
            "processes would merge the same rows twice; copy the run to a local disk of a POSIX system"
        ) from None
    after = _count(path)
    files = {name: (before.get(name, 0), after.get(name, 0)) for name in {**before, **after}}
    return Compaction(
        files,
        {
            **{str(path / name): reason for name, reason in settled.damaged.items()},
            **{str(each): reason for each, reason in damaged.items()},
        },
    )


def _count(run_dir: Path) -> dict[str, int]:
    """Files that hold rows, by folder."""
    counts = {
        _name(folder): len(without_replaced([part.path for part in folder.parts()]))
        for folder in folders(run_dir)
        if folder.path.is_dir()
    }
    tail = run_dir / TAIL
    logs = [path for path in (tail.iterdir() if tail.is_dir() else ()) if TailName.parse(path.name)]
    return {**counts, TAIL: len(logs)} if logs else counts


def _name(folder: Folder) -> str:
    return folder.table if folder.resolution is None else f"{COARSE}/{folder.resolution}/{folder.table}"
