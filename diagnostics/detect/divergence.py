"""Divergence: the loss is no number any more."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diagnostics.detect.bands import Band
from diagnostics.detect.block import Bools, Ints, Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import Finding
from diagnostics.detect.window import Window

NOT_FINITE_STEPS = 2
"""Non-finite losses in a row: one alone may be a step that a gradient scaler skips."""
ADVICE = (
    "stop the run: nothing after the first such step is of use. Restart from a checkpoint before it with a lower learning "
    "rate or the spectral bound armed, and look at the findings before that step for the cause"
)


class _Course(NamedTuple):
    """The losses handed in within a block, (L,) each, and where frames begin and end among them, (F,) each."""

    losses: Values
    in_a_row: Ints
    since: Ints
    begins: Ints
    ends: Ints


class Divergence(Detector):
    """Critical; status diverged until three frames in a row end with a finite loss."""

    kind = "divergence"
    severity = "critical"
    status = "diverged"
    over = "run"
    needed = 1
    refractory = 0

    def __init__(self, band: Band) -> None:
        super().__init__(band)
        self._in_a_row, self._since = 0, -1

    def signal(self, window: Window) -> Values:
        """1 where two losses in a row are not finite, 0.5 where the frame ends with one, NaN where none was handed in."""
        course = self._course(window)
        reached = np.concatenate([[0], np.cumsum(course.in_a_row >= NOT_FINITE_STEPS)])
        reached_here = reached[course.ends] > reached[course.begins]
        filled = course.ends > course.begins
        at_end = np.zeros(len(window), dtype=np.bool_)
        at_end[filled] = course.in_a_row[course.ends[filled] - 1] > 0
        signal = np.where(reached_here, 1.0, np.where(at_end, self.stay_share, 0.0))
        return np.where(filled, signal, np.nan)[:, None]

    def feed(self, window: Window) -> list[Finding]:
        raised = super().feed(window)
        course = self._course(window)
        if len(course.losses):
            self._in_a_row, self._since = int(course.in_a_row[-1]), int(course.since[-1])
        return raised

    def describe(self, window: Window, frame: int, column: int) -> Words:
        del column
        course, at = self._worst(window, frame)
        since = int(course.since[at])
        evidence = {
            "loss": str(float(course.losses[at])),
            "first_not_finite_step": since,
            "in_a_row": int(course.in_a_row[at]),
        }
        return Words(evidence, f"the loss is not finite since step {since}", ADVICE)

    def _finding(self, window: Window, frame: int, column: int, *, first_step: int, step: int) -> Finding:
        course, at = self._worst(window, frame)
        return super()._finding(
            window, frame, column, first_step=min(first_step, int(course.since[at])), step=step
        )

    def _worst(self, window: Window, frame: int) -> tuple[_Course, int]:
        course = self._course(window)
        begin, end = int(course.begins[frame]), int(course.ends[frame])
        return course, begin + int(np.argmax(course.in_a_row[begin:end]))

    def _course(self, window: Window) -> _Course:
        block = window.block
        losses = block.losses[block.loss_given]
        steps = block.every_step[block.loss_given]
        bad: Bools = ~np.isfinite(losses)
        index = np.arange(len(losses))
        last_good = np.maximum.accumulate(np.where(bad, -1, index)) if len(losses) else index
        carried = last_good < 0
        in_a_row = np.where(bad, index - last_good + np.where(carried, self._in_a_row, 0), 0)
        began_here = steps[np.minimum(last_good + 1, max(len(steps) - 1, 0))] if len(steps) else steps
        since = np.where(carried & (self._in_a_row > 0), self._since, began_here)
        counts = np.concatenate([[0], np.cumsum(block.loss_given)])
        ends = counts[block.ends]
        return _Course(losses, in_a_row, np.where(bad, since, -1), np.concatenate([[0], ends[:-1]]), ends)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"in_a_row": self._in_a_row, "since": self._since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._in_a_row, self._since = int(state["in_a_row"]), int(state["since"])
