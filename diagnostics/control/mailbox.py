"""The control channel on disk: commands into `control/inbox/`, what the run did into `control/journal.jsonl`.

One file per command, made visible by a rename, so that the run never sees half of one. The journal is
written by the run alone: a sender shows what it says, never its own wish.
"""

import json
import os
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diagnostics.control.commands import check_command
from diagnostics.errors import CommandError
from diagnostics.store.format import CONTROL_INBOX, CONTROL_JOURNAL
from diagnostics.store.manifest import live_state, read_manifest, write_atomically
from diagnostics.store.plain import to_json

EXPIRY_S = 60.0
FINAL_STATUSES = ("applied", "rejected", "expired")
_POLL_S = 0.1
_HALF_WRITTEN_S = 2.0
_LARGEST_BYTES = 65536


@dataclass(frozen=True)
class Command:
    """One command as found in the inbox."""

    id: str
    command: str
    arguments: Mapping[str, Any]
    run_id: str
    expires_s: float


@dataclass(frozen=True)
class Refused:
    """A file in the inbox that is no command for this run; `id` is its name, which senders give to commands."""

    id: str
    reason: str


def send(run_dir: str | os.PathLike[str], command: str, arguments: Mapping[str, Any] | None = None) -> str:
    """Puts a command into a live run's inbox and returns its id; does not wait.

    Raises:
        NotARunError: the path holds no run.
        CommandError: a malformed command, or a run that cannot take commands now.
    """
    checked = check_command(command, arguments or {})
    path = Path(run_dir)
    manifest = read_manifest(path)
    state = live_state(manifest)
    if state in ("finished", "crashed"):
        raise CommandError(
            f"{path} is {state}: commands reach live runs only; `diagnostics list` shows which are running"
        )
    if manifest.get("control") == "off":
        raise CommandError(f"{path} was started with control='off': it has no control channel")
    inbox = path / CONTROL_INBOX
    if not inbox.is_dir():
        raise CommandError(f"{inbox} is missing: the run has no control channel")
    now_s = time.time()
    # The time leads, so that sorting names gives the order of sending.
    identity = f"{int(now_s * 1e6):016d}-{uuid.uuid4().hex[:8]}"
    record = {
        "id": identity,
        "command": command,
        "arguments": checked,
        "run_id": manifest.get("run_id"),
        "sent_s": now_s,
        "expires_s": now_s + EXPIRY_S,
        "sender": f"{socket.gethostname()}:{os.getpid()}",
    }
    write_atomically(inbox / f"{identity}.json", to_json(record))
    return identity


def take_commands(run_dir: Path) -> list[Command | Refused]:
    """Empties the inbox, oldest first: what is no command of the run's own user is refused with a reason."""
    inbox = run_dir / CONTROL_INBOX
    taken: list[Command | Refused] = []
    for path in sorted(inbox.glob("*.json")) if inbox.is_dir() else []:
        if path.name.startswith("."):
            continue  # a write in progress
        try:
            found = _read_command(path)
            if found is None:
                continue
            path.unlink()
        except FileNotFoundError:
            continue  # its sender took it back
        except OSError as error:
            # A directory, say, that cannot be removed either: under another name it is met once only.
            path.rename(path.with_suffix(".refused"))
            found = Refused(path.stem, f"{path.name} cannot be read ({error})")
        taken.append(found)
    return taken


def _read_command(path: Path) -> Command | Refused | None:
    """What a file holds; None while it may still be in the writing."""
    status = path.lstat()
    if status.st_uid != os.getuid():
        return Refused(path.stem, f"{path.name} belongs to user {status.st_uid}, not to the run's user")
    if status.st_size > _LARGEST_BYTES:
        return Refused(
            path.stem, f"{path.name} has {status.st_size} bytes, a command has {_LARGEST_BYTES} at most"
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return Command(
            id=str(record["id"]),
            command=str(record["command"]),
            arguments=dict(record["arguments"]),
            run_id=str(record["run_id"]),
            expires_s=float(record["expires_s"]),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        # A sender that does not rename, as `send` does, may be seen half-way.
        if time.time() - status.st_mtime < _HALF_WRITTEN_S:
            return None
        return Refused(path.stem, f"{path.name} is no command ({type(error).__name__}: {error})")


def write_journal(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Appends what the run did with a command; on disk when this returns."""
    with (run_dir / CONTROL_JOURNAL).open("a", encoding="utf-8") as file:
        file.write(to_json(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_journal(run_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All that the run wrote about commands, oldest first; a half-written last line is left out."""
    try:
        lines = (Path(run_dir) / CONTROL_JOURNAL).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        records.append(record)
    return records


def acknowledgement(run_dir: str | os.PathLike[str], identity: str) -> dict[str, Any] | None:
    """The run's final word on a command (`status` applied, rejected or expired), or None so far."""
    for record in reversed(read_journal(run_dir)):
        if record.get("id") == identity and record.get("status") in FINAL_STATUSES:
            return dict(record)
    return None


def await_acknowledgement(
    run_dir: str | os.PathLike[str], identity: str, timeout_s: float = EXPIRY_S
) -> dict[str, Any]:
    """Waits for the run's final word; without one in time, an `expired` record made here says so."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        record = acknowledgement(run_dir, identity)
        if record is not None:
            return record
        if live_state(read_manifest(Path(run_dir))) in ("finished", "crashed"):
            break
        time.sleep(_POLL_S)
    record = acknowledgement(run_dir, identity)
    if record is not None:
        return record
    (Path(run_dir) / CONTROL_INBOX / f"{identity}.json").unlink(missing_ok=True)
    return {
        "id": identity,
        "status": "expired",
        "step": None,
        "reason": f"the run did not take the command within {timeout_s:g} s or ended before; it was withdrawn",
        "before": None,
        "after": None,
    }
