"""From a path or a URI on the command line to the runs that it names."""

import os
from pathlib import Path

from diagnostics.errors import NotARunError
from diagnostics.store.place import RemotePlace, place
from diagnostics.store.reading.find import find_runs

# As typed: a `Path` would make one slash of the two in `s3://`.
Root = str | os.PathLike[str]


def runs_below(root: Root) -> list[Path | str]:
    """The runs at or below `root`, paths or URIs as `root` is; an empty list where there are none.

    Raises:
        NotARunError: `root` is no directory, may not be read, or its store cannot be reached.
    """
    top = place(root)
    if top.local is not None and top.local.is_dir() and not os.access(top.local, os.R_OK | os.X_OK):
        raise NotARunError(f"{root} may not be read by this user; change its permissions or ask its owner")
    return find_runs(top)


def runs_named_by(path: Root) -> list[Path | str]:
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


def short_name(run_dir: Root, root: Root) -> str:
    """The run's path below `root`; its own name where it is the root itself."""
    run, top = place(run_dir), place(root)
    if isinstance(run, RemotePlace) and isinstance(top, RemotePlace):
        return run.path.removeprefix(top.path).strip("/") or run.name
    assert run.local is not None
    assert top.local is not None
    return run.local.resolve().name if run.local == top.local else run.local.relative_to(top.local).as_posix()
