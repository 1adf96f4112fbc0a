"""`run.json`: read, write, and what state it says the run is in."""

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Protocol, Self

from diagnostics.errors import NewerSchemaError, NotARunError
from diagnostics.store.format import HEARTBEAT_LOST_S, MANIFEST, SCHEMA_VERSION, TEMPORARY_SUFFIX
from diagnostics.store.migrate import migrate
from diagnostics.store.plain import to_json

Manifest = dict[str, Any]

STATES = ("running", "stalled", "crashed", "finished")

# Of these the top level tells what holds of the attempt that records now, or recorded last.
_MIRRORED = ("state", "error", "ended_s", "pid", "host")


class Folder(Protocol):
    """Where a run lies: a `pathlib.Path`, or a `Place` of the readers."""

    def __truediv__(self, name: str, /) -> Self: ...
    def is_dir(self) -> bool: ...
    def read_bytes(self) -> bytes: ...


def write_atomically(path: Path, content: str) -> None:
    """Replaces `path` so that a reader or a kill sees the old content or the new one, never a mixture.

    Raises:
        OSError: it could not be written; what was begun is removed where that can still be done.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        # A full disk would otherwise keep what it could not finish.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remove_stale_temporaries(path: Path) -> None:
    """Removes what processes that died left of writing `path`; for the one process that may write it now."""
    for temporary in path.parent.glob(f".{path.name}.*{TEMPORARY_SUFFIX}"):
        pid = temporary.name.removeprefix(f".{path.name}.").removesuffix(TEMPORARY_SUFFIX)
        if pid.isdigit() and int(pid) != os.getpid():
            temporary.unlink(missing_ok=True)


def write_manifest(run_dir: Path, manifest: Manifest) -> None:
    """Replaces run.json; the entry of the current attempt is kept in step with the top level."""
    attempt = current_attempt(manifest)
    if attempt is not manifest:
        attempt.update({key: manifest.get(key) for key in _MIRRORED})
    write_atomically(run_dir / MANIFEST, to_json(manifest, indent=1))


def read_manifest(run_dir: Folder) -> Manifest:
    """The manifest of the run in `run_dir`, of the current schema version whichever it was written in.

    Raises:
        NotARunError: the directory is missing or holds no readable run.json.
        NewerSchemaError: the run was written by a release that this one cannot read.
    """
    return migrate(read_as_written(run_dir))


def read_as_written(run_dir: Folder) -> Manifest:
    """As `read_manifest`, but of the schema version that it was written in."""
    path = run_dir / MANIFEST
    try:
        content = path.read_bytes()
    except NotARunError:
        raise  # a store that cannot be reached says so itself
    except (FileNotFoundError, NotADirectoryError):
        if not run_dir.is_dir():
            raise NotARunError(
                f"{run_dir} is not a directory; give the directory that a Recorder wrote to"
            ) from None
        raise NotARunError(
            f"{run_dir} holds no {MANIFEST}, so it is no run; `diagnostics list DIR` shows the runs below a directory"
        ) from None
    except OSError as error:
        raise NotARunError(_UNREADABLE.format(path, error)) from error
    return parse_manifest(content, path)


def parse_manifest(content: bytes, path: object) -> Manifest:
    """What run.json says, of the schema version that it was written in.

    Args:
        content: of the file.
        path: shown in errors.

    Raises:
        NotARunError: no JSON, or not a manifest.
        NewerSchemaError: a release that this one cannot read wrote it.
    """
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise NotARunError(_UNREADABLE.format(path, error)) from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise NotARunError(f"{path} has no integer schema_version, so it was not written by a Recorder")
    if version > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"{path} has schema version {version}, this release reads up to {SCHEMA_VERSION}; upgrade training-diagnostics"
        )
    return dict(manifest)


_UNREADABLE = "{} cannot be read ({}); the tables beside it may still be intact"


def current_attempt(manifest: Manifest) -> Manifest:
    """The entry of the attempt that records now or recorded last; the manifest itself where it lists none."""
    attempts = attempts_of(manifest)
    return attempts[-1] if attempts else manifest


def attempts_of(manifest: Manifest) -> list[Manifest]:
    """The entries of the attempts at the run, the first one first."""
    attempts = manifest.get("attempts")
    return [each for each in attempts if isinstance(each, dict)] if isinstance(attempts, list) else []


def attempt_number(manifest: Manifest) -> int:
    """Which attempt records now or recorded last, counted from 1."""
    number = manifest.get("attempt")
    return number if isinstance(number, int) else max(1, len(attempts_of(manifest)))


def begin_attempt(manifest: Manifest, attempt: int, *, before: str, started_s: float) -> None:
    """Makes a manifest that of a new attempt at its run, by this process; in place.

    Its `first_step` is null until a step is recorded. `every` and `config` are taken from the top level.

    Args:
        manifest: of the run so far, of the current schema version; without attempts where it is new.
        attempt: number of the new one.
        before: state that the attempt before ended in.
        started_s: unix time.
    """
    earlier = current_attempt(manifest)
    if earlier is not manifest:
        earlier["state"] = before
        if manifest.get("faults"):
            earlier["faults"] = manifest["faults"]
    manifest |= {
        "schema_version": SCHEMA_VERSION,
        "attempt": attempt,
        "state": "running",
        "error": None,
        "ended_s": None,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "heartbeat_s": started_s,
        "faults": [],
    }
    manifest["attempts"] = [
        *attempts_of(manifest),
        {
            "attempt": attempt,
            "first_step": None,
            "started_s": started_s,
            **{key: manifest.get(key) for key in (*_MIRRORED, "every", "config")},
        },
    ]


def live_state(manifest: Manifest, now_s: float | None = None) -> str:
    """One of `STATES`, judged from the manifest alone.

    A process that ends in order says so itself. Otherwise: on the writer's own host a dead process is
    `crashed`; a heartbeat that stopped is `stalled` while its process lives and `crashed` where that
    cannot be seen.
    """
    state = manifest.get("state")
    if state != "running":
        return str(state) if state in STATES else "crashed"
    alive = process_is_alive(manifest)
    if alive is False:
        return "crashed"
    beaten_s = manifest.get("heartbeat_s")
    age_s = (time.time() if now_s is None else now_s) - (
        beaten_s if isinstance(beaten_s, int | float) else 0.0
    )
    if age_s <= HEARTBEAT_LOST_S:
        return "stalled" if _step_is_overdue(manifest, now_s) else "running"
    return "stalled" if alive else "crashed"


def may_be_written(manifest: Manifest, *, lock_decides: bool) -> bool:
    """Whether another process may be recording the run, as seen by one that holds its lock.

    Args:
        manifest: the run's.
        lock_decides: whether holding the lock proves that no process of this host records.
    """
    if live_state(manifest) not in ("running", "stalled"):
        return False
    if manifest.get("host") != socket.gethostname():
        return True
    return not lock_decides and manifest.get("pid") != os.getpid()


def process_is_alive(told: Manifest) -> bool | None:
    """Whether the process that something tells of (`pid`, `host`) lives; None where that cannot be seen."""
    if told.get("host") != socket.gethostname():
        return None
    pid = told.get("pid")
    if not isinstance(pid, int):
        return None
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether a process has ended and only waits for its parent to ask how; where /proc tells."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    # The name before it stands in parentheses and may hold anything.
    return status.rpartition(")")[2].split()[:1] in (["Z"], ["X"])


def _step_is_overdue(manifest: Manifest, now_s: float | None) -> bool:
    """Whether the last step lies back far longer than steps of this attempt take."""
    attempt = current_attempt(manifest)
    started_s, first_step = attempt.get("started_s"), attempt.get("first_step") or 0
    last_s, steps = manifest.get("last_step_s"), manifest.get("steps")
    if not (isinstance(last_s, float) and isinstance(started_s, float) and isinstance(steps, int)):
        return False
    taken = steps - int(first_step)
    # A resumed run carries the last step of the attempt before on until it makes its own.
    if taken <= 1 or last_s < started_s:
        return False
    usual_s = (last_s - started_s) / taken
    waited_s = (time.time() if now_s is None else now_s) - last_s
    return waited_s > max(300.0, 100.0 * usual_s)
