"""Which parts are merged and when: by levels while a run is written, on a thread of its own.

A part that was never merged is of level 0. Whenever a writer has 8 parts of one level in a folder, they become
one of the next: a row is then rewritten once per level, and of n parts about 7 times log8(n) are left. A part
that is large enough is left alone.
"""

import atexit
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType

import pyarrow as pa

from diagnostics.store.format import PartName
from diagnostics.store.parts.folder import DamagedPartError, Folder, Part, folders
from diagnostics.store.parts.merge import StoppedError, finish_interrupted, merge

FAN_IN = 8
"""Parts of one level that become one of the next."""

TARGET_BYTES = 32 * 2**20
"""Large enough that opening files costs nothing beside reading them."""

# Where rows are sorted they are held in memory, twice for a moment.
HELD_BYTES = 64 * 2**20
_NICENESS = 10
_LOOK_AGAIN_S = 0.05

Choice = Callable[[Sequence[Part]], list[Part]]


class BusyError(Exception):
    """Met when another process merges this run."""


class NoLocksError(Exception):
    """Met when the system or the file system has no locks that would keep two merges apart."""


def due(parts: Sequence[Part], target_bytes: int = TARGET_BYTES) -> list[Part]:
    """The parts that the next merge by level takes, oldest first; none where no level is full."""
    levels: dict[tuple[int, int, int], list[Part]] = defaultdict(list)
    for part in parts:
        levels[part.name.merges, part.name.attempt, part.name.rank].append(part)
    for _, level in sorted(levels.items(), key=lambda item: item[0]):
        if len(level) >= FAN_IN:
            small = [part for part in level if _is_small(part, target_bytes)]
            if len(small) >= FAN_IN:
                return _fitting(small[:FAN_IN], target_bytes)
    return []


def all_small(parts: Sequence[Part], target_bytes: int = TARGET_BYTES) -> list[Part]:
    """The first parts of one writer, in a row and of any level, that fit into one file; none where no two do."""
    run: list[Part] = []
    for part in parts:
        alike = run and (run[0].name.attempt, run[0].name.rank) == (part.name.attempt, part.name.rank)
        if not _is_small(part, target_bytes):
            run, group = [], run
        else:
            run, group = ([*run, part], []) if alike else ([part], run)
        if len(group) > 1:
            return _fitting(group, target_bytes)
    return _fitting(run, target_bytes) if len(run) > 1 else []


def merge_folder(
    folder: Folder,
    choose: Choice,
    *,
    rank: int | None = None,
    damaged: dict[Path, str],
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Merges what `choose` says until it says nothing more; the caller keeps others from merging meanwhile.

    Args:
        folder: where.
        choose: takes a folder's parts in the order in which they were written, and says which to merge next.
        rank: whose parts alone; None: all ranks'.
        damaged: parts that were met and cannot be merged; they are left as they are, and more are added.
        stopped: True ends it, a merge under way included.

    Raises:
        OSError: the disk is full, say.
    """

    def chosen() -> list[Part]:
        parts = [part for part in folder.parts() if part.path not in damaged]
        try:
            return choose([part for part in parts if rank in (None, part.name.rank)])
        except DamagedPartError as error:
            damaged[error.path] = error.reason
            return chosen()

    with suppress(StoppedError, FileNotFoundError):
        # What a kill left beside a merged part would be merged into a second one.
        damaged |= finish_interrupted(folder, rank=rank)
        while not stopped() and (group := chosen()):
            try:
                merge(group, stopped=stopped)
            except DamagedPartError as error:
                damaged[error.path] = error.reason


@contextmanager
def alone(run_dir: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Keeps a second process from merging the run's parts, which would merge the same rows twice.

    The lock is the kernel's, so that a kill lets go of it.

    Raises:
        BusyError: another one merges, and did not end within `patience_s` seconds.
        NoLocksError: there are no locks here.
    """
    fcntl = _fcntl()
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        deadline_s = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline_s:
                    raise BusyError from None
                time.sleep(_LOOK_AGAIN_S)
            except OSError as error:
                raise NoLocksError(str(error)) from error
        try:
            yield
        finally:
            # Closing is not enough: a worker that training forked meanwhile has the descriptor too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


class Merger:
    """Merges a run's parts by level beside training: one thread, one core at most, at low priority.

    Args:
        run_dir: the run directory.
        contained: runs a callable so that its faults go to the recorder's border; after a fault, no more is merged.
        rank: whose parts alone; None: all ranks'. Where there are no locks, only one's own are safe to merge.
    """

    def __init__(self, run_dir: Path, contained: Callable[..., bool], *, rank: int | None = None) -> None:
        self._run_dir = run_dir
        self._contained = contained
        self._rank = rank
        self._damaged: dict[Path, str] = {}
        self._wanted = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._pid = os.getpid()

    def poke(self) -> None:
        """Has what piled up merged, if anything did; returns at once. For one thread."""
        if self._stopped.is_set() or self._pid != os.getpid():
            return
        self._wanted.set()
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="diagnostics-merger", daemon=True)
            # Where no thread can be had, as in an interpreter that ends, parts stay as small as they are.
            with suppress(RuntimeError):
                thread.start()
                self._thread = thread
                # A thread inside pyarrow must not meet the end of the interpreter.
                atexit.register(self.stop)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ends the thread, giving up a merge under way, which leaves no trace; idempotent.

        Args:
            timeout_s: how long to wait for it.
        """
        self._stopped.set()
        self._wanted.set()
        if self._thread is not None and self._pid == os.getpid():
            self._thread.join(timeout_s)
            atexit.unregister(self.stop)

    def _run(self) -> None:
        _yield_to_others()
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._stopped.is_set() or not self._contained(self._merge):
                return

    def _merge(self) -> None:
        waiting = [folder for folder in folders(self._run_dir) if self._is_full(folder)]
        if not waiting:
            return
        with suppress(BusyError, NoLocksError), self._lock():
            for folder in waiting:
                merge_folder(
                    folder, due, rank=self._rank, damaged=self._damaged, stopped=self._stopped.is_set
                )
        # What Arrow keeps for its next table is memory that training could use.
        pa.default_memory_pool().release_unused()

    @contextmanager
    def _lock(self) -> Iterator[None]:
        # A rank has one writer, and other processes merge nothing where there are no locks.
        try:
            with alone(self._run_dir):
                yield
        except NoLocksError:
            if self._rank is None:
                raise
            yield

    def _is_full(self, folder: Folder) -> bool:
        """Whether some level could be full, by names alone."""
        counts: dict[PartName, int] = defaultdict(int)
        for part in folder.parts():
            if self._rank in (None, part.name.rank) and part.path not in self._damaged:
                counts[PartName(0, 0, 0, part.name.attempt, part.name.rank, part.name.merges)] += 1
        return any(count >= FAN_IN for count in counts.values())


def _is_small(part: Part, target_bytes: int) -> bool:
    return 2 * part.size < target_bytes and 2 * part.held < HELD_BYTES


def _fitting(parts: Sequence[Part], target_bytes: int) -> list[Part]:
    """As many of the first small parts as fit into one file; two always do."""
    fitting: list[Part] = []
    size = held = 0
    for part in parts:
        size += part.size
        held += part.held
        if size > target_bytes or held > HELD_BYTES:
            break
        fitting.append(part)
    return fitting


def _fcntl() -> ModuleType:
    try:
        import fcntl  # noqa: PLC0415 - absent on Windows, where all else here works
    except ModuleNotFoundError:
        raise NoLocksError("this system has no POSIX file locks") from None
    return fcntl


def _yield_to_others() -> None:
    """Lets training have the cores first; Linux alone has priorities of single threads."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
