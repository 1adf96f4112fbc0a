"""Stale second moment: gradients have outgrown Adam's running average of their squares, so its steps are too long.

RMS_t = sqrt(mean(g_t^2 / max(v_t, eps^2))), the largest of all tensors, is about 1 while v follows the gradients.
Wortsman et al. (arXiv 2304.13013) saw 2.3 and more in the patch embedding 1 to 8 iterations before most loss spikes
of a CLIP ViT-H. That is one tensor of one model; the largest of many may lie above it in runs that train well. So a
level counts only where it is also 1.5 times the median of the run's own 8 values before, the newest of them left out
(of two in a row the first must not be the yardstick), and not while the loss clearly falls.
"""

import numpy as np

from diagnostics.detect import exact
from diagnostics.detect.band_words import below
from diagnostics.detect.bands import PLAIN
from diagnostics.detect.block import Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import in_words, rounded
from diagnostics.detect.window import Window

PAST = 8
BACK = 2
LEAST_KNOWN = 4
LEAST_JUMP = 1.5
ADVICE = (
    "lower beta2 (0.95 forgets old gradients within some 20 steps, 0.999 within 1,000), or divide each tensor's rate by "
    "max(1, RMS_t) as StableAdamW does; look for a change of the data at these steps"
)


class StaleSecondMoment(Detector):
    """Warning: RMS_t of g^2 / v high, and far above what it was in this run."""

    kind = "stale-second-moment"
    over = "run"
    needed = 2

    def signal(self, window: Window) -> Values:
        rms, usual = self._now_and_usual(window)
        with np.errstate(invalid="ignore"):
            stale = (rms >= LEAST_JUMP * usual) & ~window.loss.falling
        return np.where(np.isnan(rms) | np.isnan(usual), np.nan, np.where(stale, rms, 0.0))[:, None]

    def _now_and_usual(self, window: Window) -> tuple[Values, Values]:
        """(F,) each: the newest value of each frame, NaN where it has none, and the median of those before."""
        newest = window.adam_rms.recent(PAST + BACK)
        fresh = window.adam_rms.ends > window.adam_rms.begins
        past = newest[:, :PAST]
        known = (~np.isnan(past)).sum(axis=1)
        return np.where(fresh, newest[:, -1], np.nan), np.where(
            known >= LEAST_KNOWN, exact.median(past), np.nan
        )

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
