"""Where a run whose run_dir is a URI is recorded: a run directory of this machine, its spool, which is then uploaded.

Its name follows from the URI, so that whoever comes back to the URI on this machine finds what was left there.
"""

import hashlib
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from diagnostics.errors import DiagnosticsError, NotARunError, RunExistsError
from diagnostics.store.compact import Compaction, compact_run
from diagnostics.store.format import MANIFEST, PartName
from diagnostics.store.lock import holding
from diagnostics.store.manifest import Manifest, live_state, read_manifest, write_atomically
from diagnostics.store.names import holds_rows
from diagnostics.store.plain import to_json
from diagnostics.store.remote.folder import FAILURES, Remote, open_remote, refused, shown_uri
from diagnostics.store.remote.upload import upload_all
from diagnostics.store.tail.settle import settle

VARIABLE = "DIAGNOSTICS_SPOOL"


@dataclass(frozen=True)
class Spool:
    """The local half of a run behind a URI.

    Attributes:
        run_dir: the spool, to be claimed as any run directory is. Each rank has its own.
        remote: where it is uploaded.
        there: the manifest of the run that is at the URI; None where it is new.
        used_number: the largest flush number among the names at the URI; -1 where there are none.
    """

    run_dir: Path
    remote: Remote
    there: Manifest | None
    used_number: int


def spool_of(uri: str | os.PathLike[str], rank: int = 0) -> Path:
    """The folder in which this machine records a URI's run; it need not be there."""
    shown = shown_uri(os.fspath(uri))
    root = os.environ.get(VARIABLE, "")
    if not root:
        cache = os.environ.get("XDG_CACHE_HOME", "") or Path.home() / ".cache"
        root = os.fspath(Path(cache) / "training-diagnostics" / "spool")
    name = shown.partition("?")[0].rpartition("/")[2]
    identity = hashlib.sha256(shown.encode()).hexdigest()[:12]
    return Path(root).absolute() / f"{name}-{identity}{f'-r{rank}' if rank else ''}"


def open_spool(uri: str | os.PathLike[str], rank: int = 0) -> Spool:
    """Makes the spool ready to be claimed; checks that the URI can be written.

    A run that is at the URI and was never recorded on this machine, or on another one since, is continued: its
    run.json is fetched.

    Raises:
        NotARunError: no store is known by the URI's scheme, or what is there is no run of ours.
        RunExistsError: another process records to the URI, or another run is in the way.
        DiagnosticsError: the store cannot be reached or refuses, or the spool cannot be written.
    """
    remote, spool = open_remote(uri), spool_of(uri, rank)
    # Asked first: a bucket that does not exist lists like one that is empty.
    remote.check_writable()
    try:
        up = remote.sizes()
        there = read_manifest(remote.place) if MANIFEST in up else None
    except FAILURES as error:
        raise refused(remote.uri, error) from error
    if rank == 0:
        if there is not None:
            _check_unused(there, spool, remote.uri)
        try:
            with holding(spool):
                _fetch(there, spool, remote.uri)
        except OSError as error:
            raise DiagnosticsError(
                f"{spool}, where {remote.uri} is recorded before it is uploaded, cannot be written ({error}); set "
                f"{VARIABLE} to a folder that can"
            ) from error
    numbers = [part.number for name in up if (part := PartName.parse(name.rpartition("/")[2])) is not None]
    return Spool(spool, remote, there, max(numbers, default=-1))


def compact_uri(uri: str | os.PathLike[str]) -> Compaction:
    """Merges what this machine's spools of a URI still hold, and uploads it; where a recorder is at work it uploads.

    Raises:
        NotARunError: there is no run at the URI.
        DiagnosticsError: the run is recorded on another machine, or the store cannot be reached.
    """
    remote, spool = open_remote(uri), spool_of(uri)
    others = {rank: path for path in spool.parent.glob(f"{spool.name}-r*") if (rank := _rank_of(path))}
    if not others and not (spool / MANIFEST).exists():
        there = read_manifest(remote.place)
        raise DiagnosticsError(
            f"{remote.uri} is recorded on {there.get('host')}, in {there.get('spool')}: only there it can be compacted, as "
            f"there is nothing of it in {spool}"
        )
    result = compact_run(spool) if (spool / MANIFEST).exists() else Compaction()
    for rank, path in {0: spool, **others}.items():
        # Where another process holds it, that is its recorder, which uploads by itself.
        with suppress(RunExistsError), holding(path, rank):
            if rank:
                settle(path, rank)
            if rank or (path / MANIFEST).exists():
                upload_all(path, remote, rank)
    return result


def _rank_of(spool: Path) -> int:
    digits = spool.name.rpartition("-r")[2]
    return int(digits) if digits.isdigit() else 0


def _check_unused(there: Manifest, spool: Path, uri: str) -> None:
    if there.get("host") == socket.gethostname() and there.get("spool") == str(spool):
        return  # the spool's lock decides
    if live_state(there) in ("running", "stalled"):
        raise RunExistsError(
            f"{uri} is being recorded by process {there.get('pid')} on {there.get('host')}; end that process, or give "
            "another run_dir. After a process that was killed wait half a minute"
        )


def _fetch(there: Manifest | None, spool: Path, uri: str) -> None:
    """Makes the spool's run.json the latest of the run at the URI; the caller holds the spool."""
    try:
        own = read_manifest(spool)
    except NotARunError:
        own = None
    rows = holds_rows(spool)
    if there is None:
        # Whoever removes a run from its store wants a new one; but what is not uploaded is never thrown away.
        if own is not None and not rows:
            (spool / MANIFEST).unlink()
        return
    same = own is not None and own.get("run_id") == there.get("run_id")
    if rows and not same:
        raise RunExistsError(
            f"{uri} holds a run of process {there.get('pid')} on {there.get('host')}, and {spool} rows of another one that "
            "were not uploaded; give another run_dir, or move that folder away"
        )
    if own is None or not same or int(there.get("attempt") or 1) > int(own.get("attempt") or 1):
        write_atomically(spool / MANIFEST, to_json(there, indent=1))
