"""Verdicts on many runs, in processes of their own where there are many: one run's fault loses no other.

Needs neither the command line's framework nor rich, so that a worker is soon there.
"""

import math
import multiprocessing
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import pyarrow as pa

from diagnostics.errors import DamagedDataWarning
from diagnostics.report import Report
from diagnostics.store.manifest import Manifest
from diagnostics.store.place import place
from diagnostics.store.read import Run, open_run

RunDir = str | os.PathLike[str]
Task = tuple[int, RunDir]

# Workers take about a second to start: what is judged by then needs none, and so few runs are not worth them.
_ALONE_S = 1.0
_FEW = 8


class Assess(Protocol):
    """`diagnostics.report.assess`, or what a test puts in its place."""

    def __call__(self, run_or_path: Run, /, *, up_to_step: int | None) -> Report: ...


@dataclass(frozen=True)
class Judged:
    """One run and its verdict.

    Attributes:
        run_dir: as it was named.
        report: the verdict.
        info: its manifest as it stood before it was judged; empty where that could not be read.
        trouble: why it could not be judged; None: it was.
        warned: what was warned of meanwhile in another process, to be said in this one.
    """

    run_dir: RunDir
    report: Report
    info: Manifest = field(default_factory=dict)
    trouble: str | None = None
    warned: tuple[Warning, ...] = ()


Take = Callable[[int, Judged | BaseException], None]


def judge(run_dir: RunDir, up_to_step: int | None, assess: Assess) -> Judged:
    """Judges one run; raises what `open_run` and `assess` raise."""
    run = open_run(run_dir)
    # The state first: a run that ends meanwhile is then still told as running, not as ended too early.
    info = run.info
    return Judged(run_dir, assess(run, up_to_step=up_to_step), info)


def judge_each(
    run_dirs: Sequence[RunDir],
    up_to_step: int | None,
    assess: Assess,
    told: Callable[[int], None] = lambda _: None,
) -> list[Judged]:
    """Judges runs, in the order given; one that cannot be judged says why in `trouble`.

    Args:
        run_dirs: the runs.
        up_to_step: as of `assess`.
        assess: gives the verdict; a function that another process can import.
        told: called with the number of runs judged so far.
    """
    found: dict[int, Judged] = {}

    def take(index: int, judged: Judged | BaseException) -> None:
        found[index] = judged if isinstance(judged, Judged) else unjudged(run_dirs[index], judged)
        told(len(found))

    tasks: deque[Task] = deque(enumerate(run_dirs))
    alone_s = _ALONE_S if _cpus() > 1 else math.inf
    _judge_here(tasks, up_to_step, assess, take, until_s=time.perf_counter() + alone_s)
    if tasks:
        _judge_beside(tasks, up_to_step, assess, take)
        # Left where no process can be started, as in a script that does not guard its main part.
        _judge_here(tasks, up_to_step, assess, take)
    for judged in found.values():
        for warning in judged.warned:
            warnings.warn(warning, stacklevel=2)
    return [found[index] for index in range(len(run_dirs))]


class _Kept(AbstractContextManager["_Kept"]):
    """Keeps what goes wrong with one run, as a future does of another process, so that the others are judged."""

    error: Exception | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


def _judge_here(
    tasks: deque[Task], up_to_step: int | None, assess: Assess, take: Take, until_s: float = math.inf
) -> None:
    """Judges runs in this process, until a time if more than a few are left then."""
    while tasks and (len(tasks) <= _FEW or time.perf_counter() < until_s):
        index, run_dir = tasks.popleft()
        with _Kept() as kept:
            judged = judge(run_dir, up_to_step, assess)
        take(index, judged if kept.error is None else kept.error)


def unjudged(run_dir: RunDir, error: BaseException) -> Judged:
    known = isinstance(error, (ValueError, OSError))
    why = str(error) if known and str(error) else f"{type(error).__name__}: {error}"
    if os.fspath(run_dir) not in why:
        why = f"{os.fspath(run_dir)} could not be judged: {why}"
    lies = place(run_dir)
    name = lies.name if lies.local is None else lies.local.resolve().name
    return Judged(run_dir, Report(run=name, status="no-data", step=None, missing=(why,)), trouble=why)


def _judge_beside(tasks: deque[Task], up_to_step: int | None, assess: Assess, take: Take) -> None:
    """Judges runs in other processes; a run whose process dies is tried once more alone, then given up."""
    workers = min(_cpus(), math.ceil(len(tasks) / max(1, _FEW)))
    while tasks:
        with _pool(workers) as pool:
            with _deaf_to_ctrl_c():
                ready = pool.submit(_cpus)
            if ready.exception() is not None:
                return
            suspects = _drain(pool, workers, tasks, up_to_step, assess, take)
        for index, run_dir in suspects:
            with _pool(1) as alone:
                died = _take(index, _submit(alone, run_dir, up_to_step, assess), take)
            if died:
                take(index, ChildProcessError(_DIED.format(os.fspath(run_dir))))


_DIED = "{} could not be judged: the process that tried was killed, as one is that needs more memory than there is"


def _drain(
    pool: ProcessPoolExecutor,
    workers: int,
    tasks: deque[Task],
    up_to_step: int | None,
    assess: Assess,
    take: Take,
) -> list[Task]:
    """Takes tasks until none is left or a worker died; returns those that were in the workers' hands then."""
    # Few at a time: of what is handed out and not done one may be the run that kills its worker.
    under_way: dict[Future[Judged], Task] = {}
    lost: list[Task] = []
    while under_way or (tasks and not lost):
        while tasks and not lost and len(under_way) < 2 * workers:
            task = tasks.popleft()
            try:
                under_way[_submit(pool, task[1], up_to_step, assess)] = task
            except BrokenProcessPool:
                lost.append(task)
        done, _ = wait(under_way, return_when=FIRST_COMPLETED)
        for future in done:
            task = under_way.pop(future)
            if _take(task[0], future, take):
                lost.append(task)
    return lost


def _take(index: int, future: "Future[Judged]", take: Take) -> bool:
    """Takes what a worker gave; True where it died instead of giving anything."""
    error = future.exception()
    if isinstance(error, BrokenProcessPool):
        return True
    take(index, future.result() if error is None else error)
    return False


def _submit(
    pool: ProcessPoolExecutor, run_dir: RunDir, up_to_step: int | None, assess: Assess
) -> "Future[Judged]":
    with _deaf_to_ctrl_c():
        return pool.submit(_judge_and_keep_warnings, run_dir, up_to_step, assess)


def _judge_and_keep_warnings(run_dir: RunDir, up_to_step: int | None, assess: Assess) -> Judged:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DamagedDataWarning)
        judged = judge(run_dir, up_to_step, assess)
    warned = tuple(each.message for each in caught if isinstance(each.message, Warning))
    return Judged(run_dir, judged.report, judged.info, warned=warned)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with the block, at once where it is left by Ctrl-C."""
    before = set(multiprocessing.active_children())
    # Spawned: a fork of a process with Arrow's threads in it may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    ended = False
    try:
        yield pool
        ended = True
    finally:
        pool.shutdown(wait=ended, cancel_futures=not ended)
        for child in () if ended else set(multiprocessing.active_children()) - before:
            child.terminate()


def _begin_worker() -> None:
    # There are as many workers as cores; Arrow's own threads would only get in each other's way.
    pa.set_cpu_count(1)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside keep the mask: Ctrl-C reaches this one alone, which ends them without a traceback."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _cpus() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
