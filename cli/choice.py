"""From a path on the command line to the runs that it names."""

import os
from pathlib import Path

from diagnostics.errors import NotARunError
from diagnostics.store.read import find_runs


def runs_below(root: Path) -> list[Path]:
    """The run directories at or below `root`; an empty list where there are none.

    Raises:
        NotARunError: `root` is no directory, or may not be read.
    """
    if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
        raise NotARunError(f"{root} may not be read by this user; change its permissions or ask its owner")
    return find_runs(root)


def runs_named_by(path: Path) -> list[Path]:
    """The same, for a verb that has nothing to do without a run.

    Raises:
        NotARunError: there is no run at or below `path`.
    """
    runs = runs_below(path)
    if not runs:
        raise NotARunError(
            f"{path} holds no run: there is no run.json in it or below it; give the directory that a Recorder writes to"
        )
    return runs


def short_name(run_dir: Path, root: Path) -> str:
    """The run's path below `root`; its own name where it is the root itself."""
    return run_dir.resolve().name if run_dir == root else run_dir.relative_to(root).as_posix()
