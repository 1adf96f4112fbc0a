"""Sustained rise: nearly all of the last twenty losses lie far above the best median of twenty so far.

The margin is that of the labels in the field's logs, max(0.3, 0.25 |best|), which a loss that began below 1.2
reaches sooner: at a quarter of where it began. What has to exceed it is the third lowest of twenty losses, not their
median: where batches come in kinds (mixup, several tasks) the median of a healthy run strays by more than the margin.
On 356 healthy public logs (`sample_runs/evaluate/real_logs.py`) a rule on the median raises 1.17 false alarms per
1,000 points, this one 0.003; of 27 crashes they see 25 and 15 within twenty points. It waits until eighteen of twenty
losses have risen, and in very noisy losses for a larger rise.
"""

import numpy as np

from diagnostics.detect.block import Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import Finding, in_words, rounded
from diagnostics.detect.window import Window

LEVEL_LOSSES = 20
LEVEL_RANK = 2
"""The third lowest: two that are still low do not hide a rise."""
RISE_ABSOLUTE = 0.3
RISE_RELATIVE = 0.25
TINY = 1e-6
ADVICE = (
    "look at the findings just before the rise: with entropy collapse among them, restart from a checkpoint before it with "
    "the spectral bound armed; without any, suspect the data, the learning-rate schedule or the optimizer's state"
)


class LossRise(Detector):
    """Critical; status diverged until the loss is back within half the margin."""

    kind = "loss-rise"
    severity = "critical"
    status = "diverged"
    over = "run"
    needed = 1
    refractory = 0

    def signal(self, window: Window) -> Values:
        """Rise of the third lowest of twenty losses above the best median, in units of the margin."""
        with np.errstate(invalid="ignore"):
            rise = np.maximum((_level(window) - window.loss.best) / _margin(window), 0.0)
        return rise[:, None]

    def describe(self, window: Window, frame: int, column: int) -> Words:
        del column
        median, best = float(window.loss.median[frame]), float(window.loss.best[frame])
        best_step = int(window.loss.best_step[frame])
        evidence = {
            "loss_median": rounded(median),
            "loss_third_lowest_of_20": rounded(float(_level(window)[frame])),
            "best_loss_median": rounded(best),
            "best_step": best_step,
            "limit": rounded(self._limit(window, frame)),
        }
        message = (
            f"the loss has risen to {in_words(median)} (median of {LEVEL_LOSSES} steps) from its best of "
            f"{in_words(best)} around step {best_step}, and stays there"
        )
        return Words(evidence, message, ADVICE)

    def _finding(self, window: Window, frame: int, column: int, *, first_step: int, step: int) -> Finding:
        known = window.loss.per_step
        recent = known.recent(LEVEL_LOSSES)[frame]
        back = LEVEL_LOSSES - int(np.argmax(recent > self._limit(window, frame)))
        began = int(known.steps[int(known.ends[frame]) - back])
        return super()._finding(window, frame, column, first_step=min(first_step, began), step=step)

    def _limit(self, window: Window, frame: int) -> float:
        return float(window.loss.best[frame] + self.band.of("plain") * _margin(window)[frame])


def _level(window: Window) -> Values:
    """(F,) the third lowest of the last twenty losses, NaN while there are fewer."""
    recent = window.loss.per_step.recent(LEVEL_LOSSES)
    return np.where(np.isnan(recent).any(axis=1), np.nan, np.sort(recent, axis=1)[:, LEVEL_RANK])


def _margin(window: Window) -> Values:
    absolute = np.fmin(RISE_ABSOLUTE, RISE_RELATIVE * np.abs(window.loss.first))
    return np.maximum(np.maximum(absolute, RISE_RELATIVE * np.abs(window.loss.best)), TINY)
