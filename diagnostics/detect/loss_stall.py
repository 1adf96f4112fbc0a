"""Loss stall: the loss does not move.

Alone that may be a finished training; with a concentrated spectrum under near-uniform attention it is a run
that learns nothing more than token frequencies. That picture is the rank collapse of a model stuck at the unigram loss: entropy is HIGH, SEC is near 1, because
every query asks the same question. A flat loss without it is reported, not alarmed.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect.alarm import Alarm
from diagnostics.detect.finding import Finding, FindingLog, rounded
from diagnostics.detect.frame import Frame

WINDOW_STEPS = 150
FLAT_SHARE = 0.01
"""Relative change of the loss between the two halves of the window that counts as none."""
UNIFORM_FRAC = 0.75
CONCENTRATED_SEC = 0.6
ADVICE = (
    "restart with a warmup, a lower learning rate or the spectral bound armed from the start; a run that sits here for "
    "hundreds of steps seldom gets away by itself"
)


class LossStall:
    """A flat loss: warning where attention shows why, info where it does not."""

    def __init__(self) -> None:
        self._losses: deque[tuple[int, float]] = deque()
        self._alarm = Alarm(needed=3)
        self._log = FindingLog()

    def feed(self, frame: Frame) -> list[Finding]:
        finite = frame.loss_given & np.isfinite(frame.losses)
        self._losses.extend(zip(frame.steps[finite].tolist(), frame.losses[finite].tolist(), strict=True))
        while self._losses and self._losses[0][0] <= frame.step - WINDOW_STEPS:
            self._losses.popleft()
        change = self._change(frame.step)
        sec, frac = _mean(frame.spectra.column("sec_1")), _mean(frame.attention.column("entropy_frac"))
        flat = change is not None and abs(change) < FLAT_SHARE
        stuck = flat and sec >= CONCENTRATED_SEC and frac >= UNIFORM_FRAC
        raised = self._alarm.see(frame.step, start=stuck, stay=flat)
        if self._alarm.just_cleared:
            self._log.end("loss-stall", frame.step)
        if not raised:
            return []
        loss = float(np.median([loss for _, loss in self._losses]))
        evidence = {
            "loss_median": rounded(loss),
            "relative_change": rounded(change or 0.0),
            "window_steps": WINDOW_STEPS,
            "mean_sec_1": rounded(sec),
            "mean_entropy_frac": rounded(frac),
        }
        message = (
            f"the loss has not moved from {loss:.3g} for {WINDOW_STEPS} steps while attention is near uniform "
            f"({frac:.2f} of the largest entropy) and its spectrum concentrated (mean SEC {sec:.2f}): rank collapse"
        )
        return self._log.add(
            Finding(
                "loss-stall", "warning", None, None, self._alarm.onset or 0, evidence, ADVICE, message,
                status="at-risk", raised_step=frame.step,
            )
        )  # fmt: skip

    def _change(self, step: int) -> float | None:
        """Relative fall of the median loss from the older to the newer half of a full window."""
        middle = step - WINDOW_STEPS / 2
        old = [loss for at, loss in self._losses if at <= middle]
        new = [loss for at, loss in self._losses if at > middle]
        if not old or not new or self._losses[0][0] > step - 0.9 * WINDOW_STEPS:
            return None
        before = float(np.median(old))
        return (before - float(np.median(new))) / max(abs(before), 1e-12)

    def findings(self) -> list[Finding]:
        return list(self._log)

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "alarm": self._alarm.state_dict(),
            "findings": self._log.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._losses = deque((int(step), float(loss)) for step, loss in state["losses"])
        self._alarm.load_state_dict(state["alarm"])
        self._log.load_state_dict(state["findings"])


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
