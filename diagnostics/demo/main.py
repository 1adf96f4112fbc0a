"""`run_demo`: trains every arm of the demonstration, streaming each to its own run directory."""

import logging
import multiprocessing
import os
import queue
import shutil
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.queues import Queue
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diagnostics.demo.arms import ARMS, STEPS, Arm
from diagnostics.demo.train import train_arm
from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import MANIFEST

Message = tuple[str, int, float]
_AT_ONCE = 2
_news: "Queue[Message] | None" = None


def run_demo(out: Path, *, steps: int | None = None, seed: int = 0) -> list[Path]:
    """Trains the arms two at a time, each in a process with one thread, with progress bars on stderr.

    One thread each is faster than two threads one after the other on a model this small, and gives the same
    numbers however many cores there are.

    Args:
        out: directory for the runs; those of an earlier demonstration in it are replaced.
        steps: of each arm; None: the length at which the difference is plain.
        seed: of the weights and of the data order, the same for all arms.

    Returns:
        the run directories, in the order of the arms.

    Raises:
        DiagnosticsError: the directory cannot be written, or holds something that is no run.
    """
    length = STEPS if steps is None else steps
    run_dirs = [out / arm.name for arm in ARMS]
    for run_dir in run_dirs:
        _make_room(run_dir)
    # Spawned, not forked: a fork of a process that has used torch's threads may hang.
    context = multiprocessing.get_context("spawn")
    news: Queue[Message] = context.Queue()
    workers = min(_AT_ONCE, os.cpu_count() or 1)
    with (
        _progress() as progress,
        ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(news,)) as pool,
    ):
        tasks = {arm.name: progress.add_task(arm.name, total=length, loss=float("nan")) for arm in ARMS}
        trainings = [
            pool.submit(_train, arm, run_dir, length, seed)
            for arm, run_dir in zip(ARMS, run_dirs, strict=True)
        ]
        _follow(trainings, news, progress, tasks)
    return run_dirs


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _follow(
    trainings: list["Future[None]"], news: "Queue[Message]", progress: Progress, tasks: dict[str, TaskID]
) -> None:
    """Moves the bars until every training is done; the first that failed raises here."""
    for training in trainings:
        while not (training.done() and news.empty()):
            try:
                name, step, loss = news.get(timeout=0.2)
            except queue.Empty:
                continue
            progress.update(tasks[name], completed=step + 1, loss=loss)
        training.result()


def _start_worker(news: "Queue[Message]") -> None:
    global _news  # noqa: PLW0603 - a pool's worker has no other place to keep what it is started with
    _news = news
    # What the recorder prints at attach would tear the progress bars apart.
    logging.getLogger("diagnostics").addHandler(logging.NullHandler())
    torch.set_num_threads(1)


def _train(arm: Arm, run_dir: Path, steps: int, seed: int) -> None:
    news = _news
    assert news is not None, "the pool starts its workers with _start_worker"
    train_arm(
        arm, run_dir, steps=steps, seed=seed, on_step=lambda step, loss: news.put((arm.name, step, loss))
    )


def _make_room(run_dir: Path) -> None:
    if not run_dir.exists():
        return
    if not (run_dir / MANIFEST).exists() and any(run_dir.iterdir()):
        raise DiagnosticsError(f"{run_dir} exists and is no run; give another --out, or move it away")
    shutil.rmtree(run_dir)
