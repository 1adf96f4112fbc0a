"""`run.json`: read, write, and what state it says the run is in."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from diagnostics.errors import NewerSchemaError, NotARunError
from diagnostics.store.format import HEARTBEAT_LOST_S, MANIFEST, SCHEMA_VERSION, TEMPORARY_SUFFIX
from diagnostics.store.plain import to_json

Manifest = dict[str, Any]

STATES = ("running", "stalled", "crashed", "finished")


def write_atomically(path: Path, content: str) -> None:
    """Replaces `path` so that a reader or a kill sees the old content or the new one, never a mixture."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_manifest(run_dir: Path, manifest: Manifest) -> None:
    write_atomically(run_dir / MANIFEST, to_json(manifest, indent=1))


def read_manifest(run_dir: Path) -> Manifest:
    """The manifest of the run in `run_dir`.

    Raises:
        NotARunError: the directory is missing or holds no readable run.json.
        NewerSchemaError: the run was written by a release that this one cannot read.
    """
    path = run_dir / MANIFEST
    if not run_dir.is_dir():
        raise NotARunError(f"{run_dir} is not a directory; give the directory that a Recorder wrote to")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotARunError(
            f"{run_dir} holds no {MANIFEST}, so it is no run; `diagnostics list DIR` shows the runs below a directory"
        ) from None
    except (OSError, ValueError) as error:
        raise NotARunError(
            f"{path} cannot be read ({error}); the tables beside it may still be intact"
        ) from error
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int):
        raise NotARunError(f"{path} has no integer schema_version, so it was not written by a Recorder")
    if version > SCHEMA_VERSION:
        raise NewerSchemaError(
            f"{path} has schema version {version}, this release reads up to {SCHEMA_VERSION}; upgrade training-diagnostics"
        )
    return dict(manifest)


def live_state(manifest: Manifest, now_s: float | None = None) -> str:
    """One of `STATES`, judged from the manifest alone.

    A process that ends in order says so itself. Otherwise: on the writer's own host a dead process is
    `crashed`; a heartbeat that stopped is `stalled` while its process lives and `crashed` where that
    cannot be seen.
    """
    state = manifest.get("state")
    if state != "running":
        return str(state) if state in STATES else "crashed"
    alive = _process_is_alive(manifest)
    if alive is False:
        return "crashed"
    age_s = (time.time() if now_s is None else now_s) - float(manifest.get("heartbeat_s") or 0.0)
    if age_s <= HEARTBEAT_LOST_S:
        return "stalled" if _step_is_overdue(manifest, now_s) else "running"
    return "stalled" if alive else "crashed"


def _process_is_alive(manifest: Manifest) -> bool | None:
    if manifest.get("host") != socket.gethostname():
        return None
    pid = manifest.get("pid")
    if not isinstance(pid, int):
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _step_is_overdue(manifest: Manifest, now_s: float | None) -> bool:
    """Whether the last step lies back far longer than steps of this run take."""
    last_s, started_s, steps = (manifest.get(key) for key in ("last_step_s", "started_s", "steps"))
    if not (
        isinstance(last_s, float) and isinstance(started_s, float) and isinstance(steps, int) and steps > 1
    ):
        return False
    usual_s = (last_s - started_s) / steps
    waited_s = (time.time() if now_s is None else now_s) - last_s
    return waited_s > max(300.0, 100.0 * usual_s)
