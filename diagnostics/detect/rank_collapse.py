"""Rank collapse: attention of most heads near uniform, its weights' spectrum in one direction, the loss at the unigram level.

Entropy is HIGH here. Every query asks the same question, so that tokens cannot be told apart and the model learns
their frequencies only. Known from post-norm stacks without warmup and from too much weight decay (Dong et al.,
arXiv 2103.03404; Noci et al., arXiv 2206.03126); decided within the first 20 to 60 steps, after which every
signal is flat: so this rule looks at levels, not at growth, and says late what others say early.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect import exact
from diagnostics.detect.bands import PLAIN, Band
from diagnostics.detect.block import Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import Finding, in_words, rounded
from diagnostics.detect.window import GROWTH_STEPS, Window

UNIFORM_FRAC = 0.65
"""Of the median head: a few heads may be sharp in a stuck model, those of a stuck post-norm stack stand at 0.72."""
LEAST_STEPS = 100
"""Many a model stands on a first plateau of a hundred steps, with uniform attention, before it learns to attend."""
LONG_STEPS = 100
LONG_FALL = 0.02
"""A noisy loss that creeps down shows it over 100 steps, not over 50."""
MOVING_GROWTH = 0.5
"""Nats of sigma1 in 50 steps, of the median head: stuck runs of the corpus stay below 0.05."""
RISEN_SEC = 0.15
EXTREME_SEC = 0.95
LEVEL_SHARE = 0.4
"""From ln V to the unigram entropy a loss falls by about a third of itself, to the bigram entropy by nearly a half."""
ADVICE = (
    "restart with a warmup, a lower learning rate, less weight decay on Wq and Wk, or norms in front of the blocks; the "
    "spectral bound helps if armed from the start (`SpectralBound(tau=0.01)`, or `diagnostics control RUN spectral-bound "
    "--tau 0.01` at step 0); a run that sits here for hundreds of steps seldom gets away by itself"
)


class RankCollapse(Detector):
    """Mean SEC(1) over heads where attention is near uniform and the loss has stopped near its first level (warning).

    0 where the median head's entropy is below 0.65 of the largest, where the loss falls, or where it has come clearly below its
    first level; where sigma1 of the median head still grows, and where the spectrum has not come to this in this run. Not
    judged without a loss, nor in the first 100 steps.
    """

    kind = "rank-collapse"
    over = "run"
    needed = 3
    stay_share = 0.9

    def __init__(self, band: Band) -> None:
        super().__init__(band)
        self._first_sec = np.nan

    def signal(self, window: Window) -> Values:
        frac, sec = exact.median(window.now("entropy_frac")), exact.mean(window.now("sec_1"))
        loss = window.loss
        with np.errstate(invalid="ignore"):
            before = window.ago("loss_median", LONG_STEPS)[:, 0]
            creeping = before - loss.median > LONG_FALL * np.abs(before)
            # What is about to leave its plateau grows; and a model that came with such a spectrum has not collapsed here.
            moving = exact.median(window.growth("sigma1")) > MOVING_GROWTH
            collapsed = (sec - self._first(sec) >= RISEN_SEC) | (sec >= EXTREME_SEC)
            stuck = (
                ~loss.falling
                & ~creeping
                & ~moving
                & collapsed
                & (loss.median >= loss.first - LEVEL_SHARE * np.abs(loss.first))
            )
            signal = np.where(stuck & (frac >= UNIFORM_FRAC), sec, 0.0)
        judged = ~np.isnan(frac) & ~np.isnan(sec) & ~np.isnan(loss.change) & (window.age >= LEAST_STEPS)
        return np.where(judged, signal, np.nan)[:, None]

    def _first(self, sec: Values) -> float:
        """Mean SEC at the run's first measured frame."""
        known = sec[~np.isnan(sec)]
        if not np.isnan(self._first_sec) or not len(known):
            return self._first_sec
        return float(known[0])

    def feed(self, window: Window) -> list[Finding]:
        raised = super().feed(window)
        self._first_sec = self._first(exact.mean(window.now("sec_1")))
        return raised

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "first_sec": self._first_sec}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._first_sec = float(state["first_sec"])

    def describe(self, window: Window, frame: int, column: int) -> Words:  # noqa: ARG002 - the run has one column
        sec = float(exact.mean(window.now("sec_1"))[frame])
        frac = float(exact.median(window.now("entropy_frac"))[frame])
        loss, first = float(window.loss.median[frame]), float(window.loss.first[frame])
        evidence = {
            "mean_sec_1": rounded(sec),
            "mean_sec_1_healthy": f"below {self.band.of(PLAIN):.2g} while attention is near uniform",
            "median_entropy_frac": rounded(frac),
            "median_entropy_frac_healthy": f"below {UNIFORM_FRAC} once the loss has stopped falling",
            "loss_median": rounded(loss),
            "loss_first": rounded(first),
            "loss_median_healthy": f"below {first - LEVEL_SHARE * abs(first):.3g}, or falling",
            "loss_change": rounded(float(window.loss.change[frame])),
            "loss_change_steps": GROWTH_STEPS,
        }
        message = (
            f"attention of most heads is near uniform ({in_words(frac)} of the largest entropy) with its spectrum in one direction (mean "
            f"SEC {in_words(sec)}) while the loss stands at {in_words(loss)}, where it began at {in_words(first)}: rank collapse"
        )
        return Words(evidence, message, ADVICE)
