"""Logit growth: the largest attention logit of a head multiplies within some 50 steps while the loss does not fall.

Source: Wortsman et al. (arXiv 2309.14322) and Dehghani et al. (arXiv 2302.05442) trace instabilities to growing
attention logits. Their level does not separate (heads of healthy runs reach 350 because the task asks for sharp
attention); the growth of its logarithm does, best where the loss does not clearly fall.

With a soft cap the measured logit is the capped one: growth is seen on the way to the cap and none behind it; what
the head does there is for the entropy to say.
"""

import numpy as np

from diagnostics.detect.band_words import below, fold
from diagnostics.detect.bands import PLAIN, QK_NORM
from diagnostics.detect.block import Bools, Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import in_words, rounded
from diagnostics.detect.growth import burst, burst_steps
from diagnostics.detect.window import GROWTH_STEPS, Window

LOGIT_FLOOR = 1.0
"""Logits below 1 do not shape attention: growth is counted from there."""
LEAST_STEPS = 30
"""Logits of the first steps multiply in every run, from near nothing, and no loss can yet say what for."""
EARLY_FALL = 0.1
"""Share of its first level that the loss has lost: it falls, before 50 steps are there to say so."""
BENIGN_FRAC = 0.3
BENIGN_RANK = 0.6
ADVICE = (
    "watch it: `diagnostics watch RUN`; if it goes on, `diagnostics control RUN spectral-bound --tau 0.01` keeps sigma1 of "
    "Wq^T Wk from growing faster than 1 % a step; a lower learning rate or a longer warmup avoids it"
)
QK_NORM_ADVICE = (
    "queries and keys are normalised here: their logits grow through the gains of that norm alone; lower the learning "
    "rate of the gains or put weight decay on them"
)


class LogitGrowth(Detector):
    """Growth of ln(max logit) over 50 steps, counted from a logit of 1 (warning).

    0 while the loss clearly falls, and for benign heads (sharp, of high rank); not judged in the first 30 steps.
    """

    kind = "logit-growth"
    over = "heads"

    def signal(self, window: Window) -> Values:
        growth = burst(window, "max_logit", LOGIT_FLOOR)
        with np.errstate(invalid="ignore"):
            benign = (window.now("entropy_frac") <= BENIGN_FRAC) & (window.now("rank_frac") >= BENIGN_RANK)
        muted = _loss_falls(window)[:, None] | benign
        unknown = np.isnan(growth) | (window.age < LEAST_STEPS)[:, None]
        return np.where(unknown, np.nan, np.where(muted, 0.0, np.maximum(growth, 0.0)))

    def describe(self, window: Window, frame: int, column: int) -> Words:
        layer, number = window.heads[column]
        growth = float(burst(window, "max_logit", LOGIT_FLOOR)[frame, column])
        logit = float(window.now("max_logit")[frame, column])
        steps = burst_steps(window, frame)
        signal = self.signal(window)[frame]
        normed = bool(window.flag(QK_NORM)[column])
        evidence = {
            "max_logit": rounded(logit),
            "max_logit_growth": rounded(float(np.exp(growth))),
            "max_logit_growth_healthy": below(
                self.band, self.band.of(QK_NORM if normed else PLAIN), fold(GROWTH_STEPS)
            ),
            "max_logit_growth_steps": steps,
            "entropy_frac": rounded(float(window.now("entropy_frac")[frame, column])),
            "rank_frac": rounded(float(window.now("rank_frac")[frame, column])),
            "loss_change": rounded(float(window.loss.change[frame])),
            "loss_change_healthy": f"falling clearly within {GROWTH_STEPS} steps while logits grow this fast",
            "heads_growing": int((signal >= self.edges(window)).sum()),
            "heads": int((~np.isnan(signal)).sum()),
        }
        message = (
            f"attention logits are running away: the largest of {layer or 'the model'} head {number} grew "
            f"{np.exp(growth):.1f}-fold to {in_words(logit)} in {steps} steps while the loss did not fall"
        )
        return Words(evidence, message, QK_NORM_ADVICE if normed else ADVICE)


def _loss_falls(window: Window) -> Bools:
    """(F,) whether the loss clearly falls; in the first steps, whether it has fallen since the start."""
    loss = window.loss
    with np.errstate(invalid="ignore"):
        fallen = np.isnan(loss.change) & (loss.median < loss.first - EARLY_FALL * np.abs(loss.first))
    return loss.falling | fallen
