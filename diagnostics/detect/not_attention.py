"""Not attention: the loss goes wrong while every attention signal is inside its healthy band, so look elsewhere.

Reads nothing but the scores of the other detectors, all of which look before it. The loss goes wrong where one of
`LOSS_SIDE` is at its edge. Attention is cleared where none of
`ATTENTION_SIDE` came to half its edge within 100 steps and at least one could be judged within them: what was not
observed is not cleared.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect import exact
from diagnostics.detect.bands import Band
from diagnostics.detect.block import Bools, Ints, Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import Finding, rounded
from diagnostics.detect.window import Window

ATTENTION_SIDE = (
    "entropy-collapse",
    "spectral-concentration",
    "logit-growth",
    "rank-collapse",
    "saturated-attention",
)
LOSS_SIDE = ("loss-spike", "loss-rise", "divergence", "never-learned")
SUSPECTS = {
    "update-spike": "the updates of single matrices",
    "stale-second-moment": "the optimizer's second moment",
    "learning-rate-jump": "the learning rate",
}
UNIFORM_FRAC = 0.98
QUIET_SCORE = 0.5
QUIET_STEPS = 100
_LONG_AGO = -(10**9)


class NotAttention(Detector):
    """Information: the cause is to be sought in the data, the schedule or the optimizer."""

    kind = "not-attention"
    severity = "info"
    status = "healthy"
    over = "run"
    needed = 1

    def __init__(self, band: Band) -> None:
        super().__init__(band)
        self._last = dict.fromkeys(("stirred", "judged", *SUSPECTS), _LONG_AGO)

    def signal(self, window: Window) -> Values:
        judged = self._within(window, "judged", ATTENTION_SIDE, 0.0)
        stirred = self._within(window, "stirred", ATTENTION_SIDE, QUIET_SCORE)
        wrong = _any_from(window, LOSS_SIDE, 1.0)
        with np.errstate(invalid="ignore"):
            # Attention that chooses nothing is not well, if no rule knows it for an illness by itself.
            uniform = exact.median(window.now("entropy_frac")) >= UNIFORM_FRAC
        return np.where(judged, (wrong & ~stirred & ~uniform).astype(np.float64), np.nan)[:, None]

    def _steps_of_last(self, window: Window, name: str, kinds: tuple[str, ...], least: float) -> Ints:
        """(F,) the newest step at which one of the detectors had at least that score."""
        here = np.where(_any_from(window, kinds, least), window.steps, _LONG_AGO)
        return np.maximum.accumulate(np.concatenate([[self._last[name]], here]))[1:]

    def _within(self, window: Window, name: str, kinds: tuple[str, ...], least: float) -> Bools:
        return np.asarray(window.steps - self._steps_of_last(window, name, kinds, least) <= QUIET_STEPS)

    def feed(self, window: Window) -> list[Finding]:
        raised = super().feed(window)
        looked_at: dict[str, tuple[tuple[str, ...], float]] = {
            "stirred": (ATTENTION_SIDE, QUIET_SCORE),
            "judged": (ATTENTION_SIDE, 0.0),
        }
        looked_at |= {name: ((name,), 1.0) for name in SUSPECTS}
        last = {name: int(self._steps_of_last(window, name, *at)[-1]) for name, at in looked_at.items()}
        self._last = last
        return raised

    def describe(self, window: Window, frame: int, column: int) -> Words:  # noqa: ARG002 - the run has one column
        wrong = [kind for kind in LOSS_SIDE if kind in window.scores and window.scores[kind][frame] >= 1.0]
        suspects = [name for name in SUSPECTS if self._within(window, name, (name,), 1.0)[frame]]
        evidence: dict[str, Any] = {"wrong": wrong, "suspects": suspects}
        for kind in ATTENTION_SIDE:
            score = float(window.scores[kind][frame]) if kind in window.scores else -1.0
            if score < 0.0:
                continue  # not judged at this very frame
            evidence[f"{kind}_score"] = rounded(score)
            evidence[f"{kind}_score_healthy"] = (
                f"below {QUIET_SCORE} of its alarm's edge for {QUIET_STEPS} steps"
            )
        message = f"the loss goes wrong ({', '.join(wrong)}) while attention is inside its healthy band"
        if suspects:
            message += f"; what left its band is {' and '.join(SUSPECTS[name] for name in suspects)}"
        advice = (
            f"start with the findings of {' and '.join(suspects)}" if suspects else
            "look at the batches of these steps, the learning-rate schedule, the optimizer's betas and state, the precision"
        )  # fmt: skip
        return Words(evidence, message, f"{advice}; a bound on attention would not help here")

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "last": dict(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._last = {name: int(step) for name, step in state["last"].items()}


def _any_from(window: Window, kinds: tuple[str, ...], least: float) -> Bools:
    """(F,) whether one of the detectors has at least that score."""
    found = np.zeros(len(window), dtype=np.bool_)
    for kind in kinds:
        if kind in window.scores:
            found |= window.scores[kind] >= least
    return found
