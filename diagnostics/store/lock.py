"""The lock of a recording process: one writer to a run directory for each rank.

A POSIX record lock on `tail/.writer-<rank>.lock`. The kernel drops it when its process dies, however it dies,
and a forked worker does not inherit it. It does not conflict within one process, so the process keeps a list
of what it holds itself. It is also dropped when *any* descriptor of the file is closed by the process that
holds it: nothing but this module may open the file, which is never removed while a run is there.

The file says who held it last and for what; that is shown to people, and decides where a file system has no locks.
"""

import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diagnostics.errors import RunExistsError
from diagnostics.store.format import TAIL
from diagnostics.store.manifest import process_is_alive

RECORDS = "records"
SETTLES = "settles"

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_TAKEN = (errno.EACCES, errno.EAGAIN)
# Whoever settles a dead writer's tail is done in a moment, and is worth waiting for.
_PATIENCE_S = 10.0
_LOOK_AGAIN_S = 0.05
_NOTE_BYTES = 512


@dataclass(eq=False)
class Lock:
    """A held lock.

    Attributes:
        path: the lock file.
        descriptor: its open descriptor.
        of_kernel: whether the kernel guards it; on a file system without locks it only tells others.
        pid: the process that holds it; a forked child's copy of this object is worth nothing.
        last: what the last holder had noted; empty where there was none.
        noted: what this one has noted.
    """

    path: Path
    descriptor: int
    of_kernel: bool
    pid: int
    last: dict[str, Any]
    noted: dict[str, Any] = field(default_factory=dict)

    def note(self, **what: Any) -> None:  # noqa: ANN401 - JSON values
        """Notes in the file what the next holder, and those who are refused, should know; where it can be written."""
        with suppress(OSError):
            self.write_note(**what)

    def write_note(self, **what: Any) -> None:  # noqa: ANN401 - JSON values
        """As `note`, but raises OSError where it cannot be written."""
        self.noted = {**self.noted, **what}
        # Always of one length: what is there is replaced in one write, or not at all.
        os.lseek(self.descriptor, 0, os.SEEK_SET)
        os.write(self.descriptor, json.dumps(self.noted).encode().ljust(_NOTE_BYTES))

    def release(self) -> None:
        """Lets go; idempotent, and without effect in a forked child."""
        if self.pid != os.getpid():
            return
        with _GUARD:
            if self.descriptor < 0:
                return
            del _HELD[_identity(self.descriptor)]
            # Where the kernel guards nothing this is what frees the directory.
            self.note(pid=None, purpose=None)
            os.close(self.descriptor)
            self.descriptor = -1


# By device and inode, which links and other spellings of a path share.
_HELD: dict[tuple[int, int], Lock] = {}
_GUARD = threading.Lock()


def hold(run_dir: Path, rank: int = 0, *, purpose: str = RECORDS) -> Lock:
    """Takes the lock of a run directory's writer; makes `tail/` where it is missing.

    Args:
        run_dir: the run directory.
        rank: whose tail and parts the holder will write.
        purpose: `RECORDS` or `SETTLES`; one that settles is waited for.

    Raises:
        RunExistsError: another process records into the directory, or this one does already.
        OSError: the directory cannot be written.
    """
    path = lock_path(run_dir, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline_s = time.monotonic() + _PATIENCE_S
    while True:
        found = _try(path)
        if isinstance(found, Lock):
            try:
                found.write_note(
                    pid=found.pid,
                    host=socket.gethostname(),
                    purpose=purpose,
                    attempt=found.last.get("attempt"),
                )
            except OSError:
                found.release()
                raise
            return found
        if found.get("purpose") != SETTLES or time.monotonic() > deadline_s:
            raise _refusal(run_dir, rank, found)
        time.sleep(_LOOK_AGAIN_S)


@contextmanager
def holding(run_dir: Path, rank: int = 0, *, purpose: str = SETTLES) -> Iterator[Lock]:
    """Holds the lock for the time of a block; see `hold`."""
    lock = hold(run_dir, rank, purpose=purpose)
    try:
        yield lock
    finally:
        lock.release()


def lock_path(run_dir: Path, rank: int = 0) -> Path:
    return run_dir / TAIL / f".writer-{rank}.lock"


def _refusal(run_dir: Path, rank: int, noted: dict[str, Any]) -> RunExistsError:
    what = f"{run_dir} (rank {rank})" if rank else str(run_dir)
    if noted.get("here"):
        return RunExistsError(
            f"this process ({os.getpid()}) records into {what} already; close() that Recorder first, or give "
            "another run_dir (None makes a new one)"
        )
    return RunExistsError(
        f"{what} is being recorded by process {noted.get('pid')} on {noted.get('host')}; end that process, or give "
        "another run_dir (None makes a new one). The ranks of one job are told apart when the Recorder is made after "
        "torch.distributed.init_process_group, or with RANK and WORLD_SIZE in the environment"
    )


def _try(path: Path) -> Lock | dict[str, Any]:
    """The lock, or what its holder noted."""
    with _GUARD:
        while True:
            held = _held_here(path)
            if held is not None:
                # Not to be opened: closing it again would drop the lock that this process holds.
                return {**held.noted, "here": True}
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                of_kernel = _lock(descriptor)
                noted = _noted(descriptor)
                if of_kernel is None or (not of_kernel and _seems_alive(noted)):
                    return noted
                # The folder may have been removed, and made again by another, between opening and locking.
                if _identity(descriptor) == _identity(path):
                    lock = Lock(path, descriptor, of_kernel, os.getpid(), noted)
                    _HELD[_identity(descriptor)] = lock
                    descriptor = -1
                    return lock
            finally:
                if descriptor >= 0:
                    os.close(descriptor)


def _held_here(path: Path) -> Lock | None:
    held = _HELD.get(_identity(path))
    return held if held is not None and held.pid == os.getpid() else None


def _identity(file: Path | int) -> tuple[int, int]:
    try:
        status = os.fstat(file) if isinstance(file, int) else file.stat()
    except FileNotFoundError:
        return (-1, -1)
    return status.st_dev, status.st_ino


def _lock(descriptor: int) -> bool | None:
    """True: locked; False: this file system knows no locks; None: another process holds it."""
    try:
        import fcntl  # noqa: PLC0415 - absent on Windows
    except ModuleNotFoundError:
        return False
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def _noted(descriptor: int) -> dict[str, Any]:
    try:
        noted = json.loads(os.read(descriptor, _NOTE_BYTES))
    except ValueError:
        return {}
    return noted if isinstance(noted, dict) else {}


def _seems_alive(noted: dict[str, Any]) -> bool:
    """Without a kernel's word: whether the process that noted itself last lives on this host."""
    return noted.get("pid") != os.getpid() and process_is_alive(noted) is True
