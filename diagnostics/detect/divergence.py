"""Divergence: the loss is no number any more, or has risen far above its best and stays there.

The rule for a sustained rise is that of the labels in the field's logs: a rolling median exceeds the best
rolling median so far by max(0.3, 0.25 |best|). A median over 20 steps does not see a spike of a few.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect.alarm import Alarm
from diagnostics.detect.finding import Finding, FindingLog, in_words, rounded
from diagnostics.detect.frame import Frame

MEDIAN_STEPS = 20
RISE_ABSOLUTE = 0.3
RISE_RELATIVE = 0.25
NOT_FINITE_STEPS = 2
"""Non-finite losses in a row: one alone may be a step that a gradient scaler skips."""
NAN_ADVICE = (
    "stop the run: nothing after the first such step is of use. Restart from a checkpoint before it with a lower learning "
    "rate or the spectral bound armed, and look at the findings before that step for the cause"
)
RISE_ADVICE = (
    "look at the findings just before the rise: with entropy collapse among them, restart from a checkpoint before it with "
    "the spectral bound armed; without any, suspect the data, the learning-rate schedule or the optimizer's state"
)


class Divergence:
    """Non-finite loss (critical) and sustained rise of the loss (critical)."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=MEDIAN_STEPS)
        self._best: float | None = None
        self._best_step = 0
        self._bad_in_row = 0
        self._bad_since = 0
        self._not_finite = Alarm(needed=1, calm=3)
        self._risen = Alarm(needed=2, calm=3)
        self._log = FindingLog()

    def feed(self, frame: Frame) -> list[Finding]:
        given = frame.loss_given
        if not given.any():
            return []
        return [*self._feed_not_finite(frame), *self._feed_rise(frame)]

    def _feed_not_finite(self, frame: Frame) -> list[Finding]:
        steps, losses = frame.steps[frame.loss_given], frame.losses[frame.loss_given]
        start = False
        for step, loss in zip(steps.tolist(), losses.tolist(), strict=True):
            if np.isfinite(loss):
                self._bad_in_row = 0
                continue
            self._bad_since = step if self._bad_in_row == 0 else self._bad_since
            self._bad_in_row += 1
            start = start or self._bad_in_row >= NOT_FINITE_STEPS
        since = self._bad_since
        raised = self._not_finite.see(since if start else frame.step, start=start, stay=self._bad_in_row > 0)
        if self._not_finite.just_cleared:
            self._log.end("divergence", frame.step)
        if not raised:
            return []
        last = float(losses[-1])
        evidence = {"loss": str(last), "first_not_finite_step": since, "in_a_row": self._bad_in_row}
        message = f"the loss is not finite since step {since}"
        return self._log.add(
            Finding(
                "divergence", "critical", None, None, since, evidence, NAN_ADVICE, message,
                status="diverged", raised_step=frame.step,
            )
        )  # fmt: skip

    def _feed_rise(self, frame: Frame) -> list[Finding]:
        finite = frame.losses[frame.loss_given & np.isfinite(frame.losses)]
        self._recent.extend(finite.tolist())
        if len(self._recent) < MEDIAN_STEPS:
            return []
        median = float(np.median(self._recent))
        if self._best is None or median < self._best:
            self._best, self._best_step = median, frame.step
        limit = self._best + max(RISE_ABSOLUTE, RISE_RELATIVE * abs(self._best))
        raised = self._risen.see(frame.step, start=median > limit)
        if self._risen.just_cleared:
            self._log.end("loss-rise", frame.step)
        if not raised:
            return []
        evidence = {
            "loss_median": rounded(median),
            "best_loss_median": rounded(self._best),
            "best_step": self._best_step,
            "limit": rounded(limit),
        }
        message = (
            f"the loss has risen to {in_words(median)} (median of {MEDIAN_STEPS} steps) from its best of "
            f"{in_words(self._best)} around step {self._best_step}, and stays there"
        )
        return self._log.add(
            Finding(
                "loss-rise", "critical", None, None, self._risen.onset or 0, evidence, RISE_ADVICE, message,
                status="diverged", raised_step=frame.step,
            )
        )  # fmt: skip

    def findings(self) -> list[Finding]:
        return list(self._log)

    def state_dict(self) -> dict[str, Any]:
        return {
            "recent": list(self._recent),
            "best": self._best,
            "best_step": self._best_step,
            "bad_in_row": self._bad_in_row,
            "bad_since": self._bad_since,
            "not_finite": self._not_finite.state_dict(),
            "risen": self._risen.state_dict(),
            "findings": self._log.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._recent = deque(state["recent"], maxlen=MEDIAN_STEPS)
        self._best, self._best_step = state["best"], state["best_step"]
        self._bad_in_row, self._bad_since = state["bad_in_row"], state["bad_since"]
        self._not_finite.load_state_dict(state["not_finite"])
        self._risen.load_state_dict(state["risen"])
        self._log.load_state_dict(state["findings"])
