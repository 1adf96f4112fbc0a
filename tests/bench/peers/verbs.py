"""What every store of the bench is asked to do, one verb a process: `python peers/<store>.py VERB FOLDER ...`.

A process answers on its standard output with one line of JSON an answer, whatever the library under it prints. The
values are the same for every store: random walks, as a metric is, and exact in float32, so that a store which keeps
four bytes loses nothing by it. Only what `Store.log` takes is timed: the clock's time, and this thread's CPU time.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, TextIO, TypeVar

import numpy as np

PERIOD = 1000
"""Steps after which the values repeat."""
_MATRIX = np.full((256, 256), 1e-3, np.float32)


class Store(Protocol):
    """One way of keeping a run below one folder, as its users call it."""

    def start(self, names: Sequence[str]) -> None: ...

    def before(self, step: int, /) -> None:
        """What belongs to the training step and is not timed."""

    def log(self, step: int, values: Sequence[float], /) -> None: ...

    def close(self) -> None: ...

    def count(self) -> int:
        """Steps that the store's reader finds."""

    def write_series(self, losses: Sequence[float]) -> None: ...

    def read_series(self) -> int:
        """Reads every value of the run's loss; the number of values."""

    def write_runs(self, number: int) -> None:
        """So many short runs."""

    def list_runs(self) -> int: ...


S = TypeVar("S", bound=Store)


def walks(names: int) -> list[list[float]]:
    """`PERIOD` steps of so many values."""
    steps = np.random.default_rng(0).standard_normal((PERIOD, names)).cumsum(0) / 30 + 3
    return [[float(value) for value in row] for row in steps.astype(np.float32)]


def metric_names(number: int) -> list[str]:
    return ["loss", *(f"metric/{index:03d}" for index in range(1, number))]


def run(make: Callable[[Path], S], **more: Callable[[S], int]) -> None:
    """Carries out the verb of the command line; `more` are verbs that this store alone has."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    verb, folder, *numbers = sys.argv[1:]
    store = make(Path(folder))
    if verb == "write":
        _write(store, int(numbers[0]), answers)
    elif verb == "die":
        _die(store, int(numbers[0]), float(numbers[1]))
    elif verb == "series":
        losses = [row[0] for row in walks(1)]
        wanted = [losses[step % PERIOD] for step in range(int(numbers[0]))]
        started_s = time.perf_counter()
        store.write_series(wanted)
        _tell(answers, time.perf_counter() - started_s)
    elif verb == "runs":
        store.write_runs(int(numbers[0]))
        _tell(answers, 0.0)
    else:
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        found = _readers(store, more)[verb]()
        _tell(answers, [time.perf_counter() - started_s, time.process_time() - started_cpu_s, found])


def _readers(store: S, more: Mapping[str, Callable[[S], int]]) -> dict[str, Callable[[], int]]:
    own: dict[str, Callable[[], int]] = {verb: partial(call, store) for verb, call in more.items()}
    return {"count": store.count, "read": store.read_series, "list": store.list_runs, **own}


def _tell(answers: TextIO, answer: object) -> None:
    answers.write(json.dumps(answer) + "\n")


def _write(store: Store, names: int, answers: TextIO) -> None:
    """Blocks of steps as they are asked for: `[steps, pause_s]` a line; the end of the input closes the run."""
    values = walks(names)
    store.start(metric_names(names))
    _tell(answers, "ready")
    step = 0
    for line in sys.stdin:
        steps, pause_s = json.loads(line)
        wall_s, cpu_s = [], []
        for _ in range(steps):
            row = values[step % PERIOD]
            store.before(step)
            started_s, started_cpu_s = time.perf_counter(), time.thread_time()
            store.log(step, row)
            cpu_s.append(time.thread_time() - started_cpu_s)
            wall_s.append(time.perf_counter() - started_s)
            step += 1
            _train(pause_s)
        _tell(answers, [wall_s, cpu_s])
    store.close()


def _train(seconds: float) -> None:
    """Stands in for training between two steps: matrix products, which let other threads run and use the caches."""
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        _MATRIX @ _MATRIX


def _die(store: Store, steps: int, pause_s: float) -> None:
    """Logs four values a step, then dies at once, as the kernel kills a process that ate the memory."""
    values = walks(4)
    store.start(metric_names(4))
    for step in range(steps):
        store.before(step)
        store.log(step, values[step % PERIOD])
        if pause_s:
            time.sleep(pause_s)
    os.kill(os.getpid(), signal.SIGKILL)
