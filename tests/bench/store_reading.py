"""Time to list 1,000 runs, to read one series of a long run, and to draw the first picture of a large one."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rich.table import Table
from store_processes import (
    JSON_LINES,
    OURS,
    STORES,
    TENSORBOARD,
    TRACKIO,
    WANDB,
    Refusals,
    RefusedError,
    ask,
    command,
    python_of,
    wall_s,
)
from store_verdict import Goals, table

RUNS = 1000
STEPS = 1_000_000
_FEWER = {WANDB: 100_000}
"""Where writing all of them would take the bench minutes."""
_LIST_GOAL_S = 1.0
_READ_GOAL = 0.1
_PICTURE_GOAL_S = 1.0
_QUICK_S = 2.0
_REPEATS = 3
_HAS_READER = (TENSORBOARD, TRACKIO)
"""The peers whose series is read by code of their own; the goal is held against these."""

_LISTED = {
    OURS: "name, state, steps, verdict",
    TENSORBOARD: "names; reads the event files",
    TRACKIO: "names",
    WANDB: "names; within: our scan for each configuration",
    JSON_LINES: "names, last step",
}


@dataclass(frozen=True)
class Answer:
    """Medians of the clock's seconds and of CPU seconds, all threads; and how much was found."""

    wall_s: float
    cpu_s: float
    found: int


def list_table(root: Path, refusals: Refusals, goals: Goals) -> Table:
    shown = table(
        f"seconds to list {RUNS:,} runs",
        ("store", "whole process", "within it", "within it, CPU", "what is listed"),
    )
    whole_s: dict[str, float] = {}
    for store in STORES:
        folder = root / f"{store.replace(' ', '-')}-runs"
        folder.mkdir()
        cells: tuple[str, ...] = ("not measured",) * 3
        with refusals.noted(store):
            ask(store, "runs", folder, RUNS)
            inside = _repeated(partial(ask, store, "list", folder))
            _check(inside.found, RUNS)
            whole_s[store] = _repeated(partial(_whole_process, store, folder)).wall_s
            cells = (f"{whole_s[store]:.2f}", f"{inside.wall_s:.3f}", f"{inside.cpu_s:.3f}")
        shown.add_row(store, *cells, _LISTED[store])
    ours = whole_s.get(OURS)
    goals.add(
        f"list of {RUNS:,} runs below {_LIST_GOAL_S:.0f} s",
        "" if ours is None else f"{ours:.2f} s as a whole process",
        met=None if ours is None else ours < _LIST_GOAL_S,
    )
    return shown


def _whole_process(store: str, folder: Path) -> tuple[float, float, int]:
    return wall_s(store, _list_command(store, folder), folder), 0.0, RUNS


def _list_command(store: str, folder: Path) -> list[str]:
    """The store's own command where it has one."""
    tools = python_of(store).parent
    of_project = ["list", "runs", "--project", "bench"]
    own = {
        OURS: [str(tools / "diagnostics"), "list", str(folder)],
        # `env` tells it, and no other, where its projects lie.
        TRACKIO: ["env", f"TRACKIO_DIR={folder}", str(tools / "trackio"), *of_project],
        WANDB: [str(tools / "wandb"), "sync", "--dry-run"],
    }
    return own.get(store, command(store, "list", folder))


def _repeated(measure: Callable[[], tuple[float, float, int]]) -> Answer:
    """Three times, or once where it takes long."""
    answers = [measure()]
    while answers[0][0] < _QUICK_S and len(answers) < _REPEATS:
        answers.append(measure())
    wall, cpu, found = zip(*answers, strict=True)
    return Answer(statistics.median(wall), statistics.median(cpu), found[-1])


def series_table(root: Path, refusals: Refusals, goals: Goals) -> Table:
    """Writes the runs; the one of this project stays at `root / "ours"` for the picture."""
    shown = table(
        "seconds to read one series of a long run", ("store", "series", "values", "read", "CPU", "written in")
    )
    taken: dict[str, float] = {}
    for store in STORES:
        folder, steps = root / store.replace(" ", "-"), _FEWER.get(store, STEPS)
        cells: tuple[str, ...] = ("not measured",)
        with refusals.noted(store):
            written_s = ask(store, "series", folder, steps)
            loss = _repeated(partial(ask, store, "read", folder))
            _check(loss.found, steps)
            taken[store] = loss.wall_s
            cells = (*_cells(loss), f"{written_s:.0f} s")
        shown.add_row(store, "loss", *cells)
        if store == OURS:
            with refusals.noted(store):
                head = _repeated(partial(ask, OURS, "head", folder))
                shown.add_row(store, "entropy of one head of 144", *_cells(head), "the same run")
    peers = {store: taken[store] for store in _HAS_READER if store in taken}
    slowest = max(peers, key=lambda store: peers[store], default=None)
    goal = "a series of 10^6 steps in a tenth of the slowest peer's time"
    if OURS not in taken or slowest is None:
        goals.add(goal, "", met=None)
    else:
        share = taken[OURS] / peers[slowest]
        goals.add(goal, f"{taken[OURS]:.2f} s, {share:.1%} of {slowest}'s", met=share <= _READ_GOAL)
    return shown


def _check(found: int, wanted: int) -> None:
    if found != wanted:
        raise RefusedError(f"its reader finds {found:,} of {wanted:,}")


def _cells(answer: Answer) -> tuple[str, str, str]:
    return f"{answer.found:,}", f"{answer.wall_s:.2f}", f"{answer.cpu_s:.2f}"


def picture_line(run_dir: Path, refusals: Refusals, goals: Goals) -> str:
    """Of the run that `series_table` wrote."""
    goal = f"first picture of 1,008 series x {STEPS:,} steps below {_PICTURE_GOAL_S:.0f} s"
    with refusals.noted(OURS):
        drawn = _repeated(partial(ask, OURS, "picture", run_dir))
        goals.add(goal, f"{drawn.wall_s:.2f} s", met=drawn.wall_s < _PICTURE_GOAL_S)
        return (
            f"first picture of a run of {STEPS:,} steps with 1,008 series of heads, measured every 10 steps: "
            f"{drawn.wall_s:.2f} s, CPU {drawn.cpu_s:.2f} s, {drawn.found:,} points; no peer's is measured: it would have "
            "to write 10^8 values first, at the rate above"
        )
    goals.add(goal, "", met=None)
    return "first picture: not measured"
