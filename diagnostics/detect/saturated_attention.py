"""Saturated attention: most heads look at single keys from the first steps on, and the loss does not move.

Known from too large initial query and key weights (softmax saturates and passes no gradient on: Vaswani et al.,
arXiv 1706.03762, section 3.2.1, is why logits are divided by sqrt(d)). Nothing grows here, so that the rules on
growth see nothing, and every head is sharp without being of low rank. The threshold is ours: the median head of a
model that learns is never below a tenth of the largest entropy before its loss has begun to fall.

Wrong where a model comes trained already, with most heads that sharp, and its loss has no way to go.
"""

import numpy as np

from diagnostics.detect import exact
from diagnostics.detect.bands import PLAIN
from diagnostics.detect.block import Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import in_words, rounded
from diagnostics.detect.window import Window

SATURATED_FRAC = 0.1
LARGE_LOGIT = 20.0
"""exp(20): one key outweighs all others of any context."""
LEARNED_SHARE = 0.15
"""Share of its first level by which the loss has to fall to count as moving."""
TINY = 1e-6
ADVICE = (
    "look at the initial weights of queries and keys, and at the scale of the logits (1 / sqrt(head size)): restart with "
    "smaller ones, or with QK-norm; a model seldom trains its way out of it"
)


class SaturatedAttention(Detector):
    """A tenth over the median head's share of the largest entropy (warning).

    0 where its logits are small or the loss has fallen by 15 %; not judged without a loss.
    """

    kind = "saturated-attention"
    over = "run"
    needed = 2

    def signal(self, window: Window) -> Values:
        frac, logit = exact.median(window.now("entropy_frac")), exact.median(window.now("max_logit"))
        loss = window.loss
        with np.errstate(invalid="ignore"):
            unmoved = loss.best >= loss.first - LEARNED_SHARE * np.abs(loss.first)
            signal = np.where(unmoved & (logit >= LARGE_LOGIT), SATURATED_FRAC / np.maximum(frac, TINY), 0.0)
        judged = ~np.isnan(frac) & ~np.isnan(logit) & ~np.isnan(loss.median)
        return np.where(judged, signal, np.nan)[:, None]

    def describe(self, window: Window, frame: int, column: int) -> Words:  # noqa: ARG002 - the run has one column
        frac = float(exact.median(window.now("entropy_frac"))[frame])
        logit = float(exact.median(window.now("max_logit"))[frame])
        first, best = float(window.loss.first[frame]), float(window.loss.best[frame])
        evidence = {
            "median_entropy_frac": rounded(frac),
            "median_entropy_frac_healthy": f"above {SATURATED_FRAC / self.band.of(PLAIN):.2g} before the loss has fallen",
            "median_max_logit": rounded(logit),
            "median_max_logit_healthy": f"below {LARGE_LOGIT:g} before the loss has fallen",
            "loss_first": rounded(first),
            "best_loss_median": rounded(best),
            "best_loss_median_healthy": f"below {first - LEARNED_SHARE * abs(first):.3g}",
        }
        message = (
            f"most heads look at single keys ({in_words(frac)} of the largest entropy, largest logit {in_words(logit)} in the "
            f"median head) while the loss has hardly moved from {in_words(first)}: attention is saturated"
        )
        return Words(evidence, message, ADVICE)
