"""Fast concentration: spectral energy goes into one direction within 30 steps, early in a run. Worth knowing, no alarm.

Source: arXiv 2505.21910, where fast growth of sigma1(Wq^T Wk) and of SEC comes before malignant collapse. It is the
earliest sign there is: the failing arm of the demonstration shows it at step 20. But small models that go on to train
well at a high rate show it too, and nothing tells them apart by then: `spectral_concentration.py` waits until the
logits have followed.
"""

import numpy as np

from diagnostics.detect import exact
from diagnostics.detect.block import Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import in_words, rounded
from diagnostics.detect.growth import burst, burst_steps
from diagnostics.detect.window import GROWTH_STEPS, Window

SIGMA_FLOOR = 0.02
RISE_STEPS = 30
FAST_RISE = 0.4
"""Rise of the mean SEC(1) over all heads; arms with a warmup or a bound stayed below 0.28."""
ADVICE = (
    "no harm yet: watch whether logits follow, `diagnostics watch RUN`. A warmup, a lower rate, or "
    "`diagnostics control RUN spectral-bound --tau 0.01` now, which costs little, keeps sigma1 from running away"
)


class FastConcentration(Detector):
    """Growth of ln sigma1 over 50 steps where the mean SEC(1) rose by 0.4 within 30 steps; else 0."""

    kind = "fast-concentration"
    severity = "info"
    status = "healthy"
    over = "heads"

    def signal(self, window: Window) -> Values:
        growth = burst(window, "sigma1", SIGMA_FLOOR)
        with np.errstate(invalid="ignore"):
            fast = exact.mean(_rise(window)) >= FAST_RISE
        counted = np.where(fast[:, None], np.maximum(growth, 0.0), 0.0)
        return np.where(np.isnan(growth), np.nan, counted)

    def describe(self, window: Window, frame: int, column: int) -> Words:
        layer, number = window.heads[column]
        growth = float(burst(window, "sigma1", SIGMA_FLOOR)[frame, column])
        rise, steps = float(exact.mean(_rise(window))[frame]), burst_steps(window, frame)
        mean_sec = float(exact.mean(window.now("sec_1"))[frame])
        evidence = {
            "mean_sec_1": rounded(mean_sec),
            "mean_sec_1_rise": rounded(rise),
            "mean_sec_1_rise_healthy": f"below {FAST_RISE} in {RISE_STEPS} steps",
            "sigma1": rounded(float(window.now("sigma1")[frame, column])),
            "sigma1_growth": rounded(float(np.exp(growth))),
            "sigma1_growth_healthy": f"below {np.exp(self.band.of('plain')):.1f}-fold in {GROWTH_STEPS} steps",
            "sigma1_growth_steps": steps,
        }
        message = (
            f"spectral energy concentrates fast: mean SEC rose by {in_words(rise)} to {in_words(mean_sec)} within "
            f"{RISE_STEPS} steps, sigma1 of Wq^T Wk grew {np.exp(growth):.1f}-fold in {layer or 'the model'} head {number}; "
            "whether harm comes of it, the logits will tell"
        )
        return Words(evidence, message, ADVICE)


def _rise(window: Window) -> Values:
    """(F, H) rise of SEC(1) within 30 steps."""
    return np.asarray(window.now("sec_1") - window.ago("sec_1", RISE_STEPS))
