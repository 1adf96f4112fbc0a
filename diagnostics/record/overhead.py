"""What the recorder itself takes of training's time."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Overhead:
    """Seconds spent in the recorder on the training thread: all so far, and those of the step now open."""

    def __init__(self) -> None:
        self.in_step_s = 0.0
        self._total_s = 0.0
        self._running = False
        self._started_s = time.perf_counter()

    @property
    def share(self) -> float:
        """Of the wall time since the recorder was attached, 0 to 1."""
        return min(1.0, self._total_s / max(1e-9, time.perf_counter() - self._started_s))

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what runs within; once, where one such block lies in another."""
        if self._running:
            yield
            return
        self._running = True
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._running = False
            self.in_step_s += time.perf_counter() - start_s

    def close_step(self, start_s: float) -> float:
        """The seconds of the step that closes now, whose closing began at `start_s`; the next begins at none."""
        seconds = self.in_step_s + time.perf_counter() - start_s
        self._total_s += seconds
        self.in_step_s = 0.0
        return seconds
