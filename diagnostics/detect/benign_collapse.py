"""Benign entropy collapse: heads that attend to single keys with a map of high rank, near the identity or a shift.

Source: arXiv 2505.21910 ("state B"): attention is close to a linear map, and training goes on. It is reported, so
that nobody takes low entropy alone for a sick head, and is no alarm.
"""

import numpy as np

from diagnostics.detect.bands import PLAIN
from diagnostics.detect.block import Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import in_words, rounded
from diagnostics.detect.window import Window

SHARP_FRAC = 0.3


class BenignCollapse(Detector):
    """The effective rank of a sharp head's map, as a share of its rows (info); 0 where the head is not sharp."""

    kind = "benign-entropy-collapse"
    severity = "info"
    status = "healthy"
    over = "heads"
    needed = 3
    stay_share = 0.8

    def signal(self, window: Window) -> Values:
        frac, rank = window.now("entropy_frac"), window.now("rank_frac")
        with np.errstate(invalid="ignore"):
            sharp_rank = np.where(frac <= SHARP_FRAC, rank, 0.0)
        return np.where(np.isnan(frac), np.nan, sharp_rank)

    def describe(self, window: Window, frame: int, column: int) -> Words:
        layer, number = window.heads[column]
        at = {
            name: float(window.now(name)[frame, column])
            for name in ("entropy", "entropy_frac", "rank_frac", "max_logit")
        }
        signal = self.signal(window)[frame]
        evidence = {
            "entropy": rounded(at["entropy"]),
            "entropy_frac": rounded(at["entropy_frac"]),
            "entropy_frac_healthy": f"any: a head is called sharp from {SHARP_FRAC} down",
            "rank_frac": rounded(at["rank_frac"]),
            "rank_frac_healthy": f"above {self.band.of(PLAIN):.2g} while attention is sharp",
            "max_logit": rounded(at["max_logit"]),
            "heads_sharp": int((signal >= self.edges(window)).sum()),
            "heads": int((~np.isnan(signal)).sum()),
        }
        message = (
            f"{layer or 'the model'} head {number} attends to single keys ({in_words(at['entropy_frac'])} of the largest "
            f"entropy) with a map of high rank ({in_words(at['rank_frac'])} of its rows): sharp, but not collapsing"
        )
        return Words(
            evidence, message, "nothing to do while the loss improves; such heads copy or shift tokens"
        )
