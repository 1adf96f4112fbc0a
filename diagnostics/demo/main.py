"""`run_demo`: trains every arm of the demonstration, streaming each to its own run directory."""

import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from diagnostics.demo.arms import ARMS, STEPS
from diagnostics.demo.train import train_arm
from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import MANIFEST


def run_demo(out: Path, *, steps: int | None = None, seed: int = 0) -> list[Path]:
    """Trains the arms one after the other, with a progress bar on stderr.

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
    columns = (
        TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    # Two threads are what the promise of four minutes is made for; more only help larger models.
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            tasks = [progress.add_task(arm.name, total=length, loss=float("nan")) for arm in ARMS]
            for arm, run_dir, task in zip(ARMS, run_dirs, tasks, strict=True):
                train_arm(
                    arm, run_dir, steps=length, seed=seed,
                    on_step=lambda _, loss, task=task: progress.update(task, advance=1, loss=loss),
                )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    return run_dirs


def _make_room(run_dir: Path) -> None:
    if not run_dir.exists():
        return
    if not (run_dir / MANIFEST).exists() and any(run_dir.iterdir()):
        raise DiagnosticsError(f"{run_dir} exists and is no run; give another --out, or move it away")
    shutil.rmtree(run_dir)
