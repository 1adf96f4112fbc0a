"""Stale second moment: gradients have outgrown Adam's running average of their squares, so its steps are too long.

RMS_t = sqrt(mean(g_t^2 / max(v_t, eps^2))), the largest of all tensors, is about 1 while v follows the gradients.
Wortsman et al. (arXiv 2304.13013) saw 2.3 and more in the patch embedding 1 to 8 iterations before most loss spikes
of a CLIP ViT-H. That is one tensor of one model; the largest of many may lie above it in runs that train well. So a
level counts only where it lasts (the lowest within 15 steps), is twice the median of the run's own 8 values before
(`yardstick.py`), and not while the loss clearly falls.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect import exact
from diagnostics.detect.band_words import below
from diagnostics.detect.bands import PLAIN, Band
from diagnostics.detect.block import Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import Finding, in_words, rounded
from diagnostics.detect.window import Window
from diagnostics.detect.yardstick import LEAST_KNOWN, REACH, Lookback, began

LEAST_JUMP = 2.0
ADVICE = (
    "lower beta2 (0.95 forgets old gradients within some 20 steps, 0.999 within 1,000), or divide each tensor's rate by "
    "max(1, RMS_t) as StableAdamW does; look for a change of the data at these steps"
)


class StaleSecondMoment(Detector):
    """Worth knowing: RMS_t of g^2 / v high, and far above what it was in this run.

    No alarm: in the corpus it comes with the damage or heals with it, and warns of nothing before.
    """

    kind = "stale-second-moment"
    severity = "info"
    status = "healthy"
    over = "run"
    needed = 2

    def __init__(self, band: Band) -> None:
        super().__init__(band)
        self._before = [np.nan] * REACH
        """Values at the frames before the window's, oldest first."""

    def signal(self, window: Window) -> Values:
        rms, usual = self._now_and_usual(window)
        stale = (rms >= LEAST_JUMP * usual) & ~window.loss.falling
        known = ~np.isnan(_measured(window)) & ~np.isnan(usual)
        return np.where(known, np.where(stale, rms, 0.0), np.nan)[:, None]

    def _now_and_usual(self, window: Window) -> tuple[Values, Values]:
        """(F,) each: the lowest value within 15 steps, and the median of those before."""
        back = Lookback.of(window)
        values = np.concatenate([self._before, _measured(window)])
        past = values[back.past]
        enough = (~np.isnan(past)).sum(axis=1) >= LEAST_KNOWN
        return back.lowest(values[:, None])[:, 0], np.where(enough, exact.median(past), np.nan)

    def feed(self, window: Window) -> list[Finding]:
        raised = super().feed(window)
        self._before = [*self._before, *_measured(window)[-REACH:].tolist()][-REACH:]
        return raised

    def _finding(self, window: Window, frame: int, column: int, *, first_step: int, step: int) -> Finding:
        first_step = began(window, first_step, step)
        return super()._finding(window, frame, column, first_step=first_step, step=step)

    def describe(self, window: Window, frame: int, column: int) -> Words:  # noqa: ARG002 - the run has one column
        rms, usual = (float(values[frame]) for values in self._now_and_usual(window))
        evidence = {
            "adam_rms": rounded(rms),
            "adam_rms_healthy": below(self.band, self.band.of(PLAIN), in_words),
            "adam_rms_usual": rounded(usual),
            "adam_rms_usual_healthy": f"now at most {LEAST_JUMP:g} times it",
        }
        message = (
            f"Adam's second moment lags behind the gradients: RMS of g^2/v is {in_words(rms)} in the worst tensor, "
            f"{in_words(usual)} before, so steps are up to that much too long"
        )
        return Words(evidence, message, ADVICE)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "before": list(self._before)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._before = list(state["before"])


def _measured(window: Window) -> Values:
    """(F,) the newest value of each frame; NaN where it has none."""
    fresh = window.adam_rms.ends > window.adam_rms.begins
    return np.where(fresh, window.adam_rms.last(), np.nan)
