"""`find_runs`: the run directories below a root, local or behind a URI."""

import os
from pathlib import Path
from typing import overload

from diagnostics.errors import NotARunError
from diagnostics.store.format import MANIFEST
from diagnostics.store.place import Place, place


@overload
def find_runs(root: Path) -> list[Path]: ...
@overload
def find_runs(root: str | os.PathLike[str] | Place) -> list[Path | str]: ...
def find_runs(root: str | os.PathLike[str] | Place) -> list[Path] | list[Path | str]:
    """The run directories at or below `root`, in name order; looks inside no run.

    Returns:
        Paths for a root on this machine, URIs (as str) for a root behind one: both are what `open_run` takes.

    Raises:
        NotARunError: `root` is no directory, or its store cannot be reached.
    """
    top = place(root)
    if top.local is not None:
        return _local(top.local)
    found = _remote(top)
    if not found and not top.is_dir():
        raise NotARunError(_NO_DIRECTORY.format(top))
    return found


_NO_DIRECTORY = "{} is not a directory; give a run directory or a directory that holds runs"


def _local(top: Path) -> list[Path]:
    if not top.is_dir():
        raise NotARunError(_NO_DIRECTORY.format(top))
    found: list[Path] = []
    for folder, subfolders, files in os.walk(top):
        if MANIFEST in files:
            found.append(Path(folder))
            subfolders.clear()
        else:
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
    return found


def _remote(top: Place) -> list[Path | str]:
    """One listing of everything: an object store answers it in pages of a thousand, a folder each costs a request."""
    names = [entry.name for entry in top.entries(recursive=True) if not entry.is_dir]
    if MANIFEST in names:
        return [str(top)]
    ending = f"/{MANIFEST}"
    found: list[tuple[str, ...]] = []
    for folder in sorted(tuple(name.split("/")[:-1]) for name in names if name.endswith(ending)):
        inside_a_run = bool(found) and folder[: len(found[-1])] == found[-1]
        if not inside_a_run and not any(part.startswith(".") for part in folder):
            found.append(folder)
    return [str(top / "/".join(folder)) for folder in found]
