"""The runs below a root and their run.json, each read again only once it has changed. No streamlit here.

A list of a thousand runs is looked at every few seconds: what it costs then is one look at each file's time.
"""

import os
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import MANIFEST
from diagnostics.store.manifest import live_state, read_manifest
from diagnostics.store.place import place
from diagnostics.store.reading.find import find_runs

Stamp = tuple[int, int, int]

# What a list needs of a run.json; the rest, most of it the same words in every run, is not kept.
_KEPT = (
    "run_id",
    "state",
    "pid",
    "host",
    "heartbeat_s",
    "last_step_s",
    "started_s",
    "steps",
    "every",
    "status",
    "summary",
    "attempt",
    "attempts",
)


@dataclass(frozen=True)
class Listed:
    """One run of a list.

    Attributes:
        run: path or URI, as `open_run` takes it.
        name: what the pages and the address call it: the path below the root.
        stamp: changes whenever its run.json does.
        info: what its run.json holds, with the state judged now; {} where it cannot be read.
        problem: why it cannot be read, or None.
    """

    run: str
    name: str
    stamp: Stamp | None
    info: dict[str, Any]
    problem: str | None = None


class Listing:
    """Lists runs; safe to use from several threads."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[Stamp, dict[str, Any] | str]] = {}
        self._lock = threading.Lock()

    def runs(self, root: str | os.PathLike[str]) -> list[Listed]:
        """Every run at or below `root`, in name order.

        Raises:
            NotARunError: `root` is no directory, or its store cannot be reached.
        """
        names = run_names(root)
        stamps = _stamps(root, names)
        with self._lock:
            return [self._listed(run, name, stamps.get(run)) for name, run in names.items()]

    def _listed(self, run: str, name: str, stamp: Stamp | None) -> Listed:
        kept = self._kept.get(run)
        if stamp is None or kept is None or kept[0] != stamp:
            content = _read(run)
            if stamp is not None:
                self._kept[run] = (stamp, content)
        else:
            content = kept[1]
        if isinstance(content, str):
            return Listed(run, name, stamp, {}, content)
        # The state is judged at each look: a process dies without a word in its run.json.
        return Listed(run, name, stamp, {**content, "state": live_state(content)})


def run_names(root: str | os.PathLike[str]) -> dict[str, str]:
    """The runs below `root` by the name that the address and the pages use: the path relative to `root`."""
    top = place(root)
    if top.local is not None:
        return {
            (path.resolve().name if path == top.local else path.relative_to(top.local).as_posix()): str(path)
            for path in find_runs(top.local)
        }
    prefix = str(top).partition("?")[0]
    return {
        (str(run).partition("?")[0].removeprefix(prefix).strip("/") or top.name): str(run)
        for run in find_runs(top)
    }


def manifest_stamp(run: str | os.PathLike[str]) -> Stamp | None:
    """Changes whenever the run.json of a local run does; None where there is none."""
    try:
        status = (Path(run) / MANIFEST).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _stamps(root: str | os.PathLike[str], names: dict[str, str]) -> dict[str, Stamp]:
    top = place(root)
    if top.local is not None:
        return {run: stamp for run in names.values() if (stamp := manifest_stamp(run)) is not None}
    # One listing of everything below a URI, where a look at each file would cost a request each.
    files = {entry.name: entry for entry in top.entries(recursive=True) if entry.name.endswith(MANIFEST)}
    return {
        run: (entry.mtime_ns, entry.size, 0)
        for name, run in names.items()
        if (entry := files.get(f"{name}/{MANIFEST}")) is not None
    }


def _read(run: str) -> dict[str, Any] | str:
    try:
        manifest = read_manifest(place(run))
    except DiagnosticsError as error:
        return str(error)
    return {key: manifest[key] for key in _KEPT if key in manifest}


LISTING = Listing()
