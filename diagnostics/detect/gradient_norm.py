"""Growth of the gradient norm: far above its own recent band while the loss does not fall.

Reported, never alarmed. On 419 public training logs (`sample_runs/evaluate/real_logs.py`) no rule on the gradient
norm that was tried saw any of 27 crashes coming at a bearable rate of false alarms, this one included; norms also
grow ten-fold in the course of trainings that end well. Beside another finding it still tells where to look.
"""

import numpy as np

from diagnostics.detect import exact
from diagnostics.detect.block import Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import in_words, rounded
from diagnostics.detect.window import Window

NOW_STEPS = 5
USUAL_STEPS = 64
LEAST_STEPS = 20
UPPER_SHARE = 0.9
SPREAD_FLOOR = 0.1
"""Least spread of ln(gradient norm): a norm that hardly varies is not reported for a tenth more."""
TINY = 1e-30
ADVICE = (
    "look for update spikes and a raised learning rate among the findings; gradient clipping at the usual norm keeps one bad "
    "batch from doing damage"
)


class GradientGrowth(Detector):
    """Info; no change of status."""

    kind = "gradient-growth"
    severity = "info"
    status = "healthy"
    over = "run"

    def signal(self, window: Window) -> Values:
        """Spreads of ln(gradient norm) by which the median of five steps exceeds that of the 64 before; 0 as the loss falls."""
        now, usual, spread = _levels(window)
        with np.errstate(invalid="ignore"):
            grown = np.maximum((now - usual) / spread, 0.0)
        return np.where(np.isnan(grown), np.nan, np.where(window.loss.falling, 0.0, grown))[:, None]

    def describe(self, window: Window, frame: int, column: int) -> Words:
        del column
        now, usual, spread = (float(values[frame]) for values in _levels(window))
        edge = self.band.of("plain")
        evidence = {
            "grad_norm_median_of_5": rounded(float(np.exp(now))),
            "grad_norm_usual": rounded(float(np.exp(usual))),
            "grad_norm_usual_healthy": [
                rounded(float(np.exp(usual - edge * spread))),
                rounded(float(np.exp(usual + edge * spread))),
            ],
            "spreads_above": rounded((now - usual) / spread),
        }
        message = (
            f"the gradient norm has grown to {in_words(float(np.exp(now)))} from about {in_words(float(np.exp(usual)))} "
            "while the loss does not fall"
        )
        return Words(evidence, message, ADVICE)


def _levels(window: Window) -> tuple[Values, Values, Values]:
    """(F,) each, of ln(gradient norm): now, usual, and the spread of the usual; NaN where too few are known.

    Where it does not stand above nine tenths of those before, the usual is put down as what it is now: to sort the
    past of every frame would cost more than all other rules on the loss together.
    """
    recent = window.grad_norm.recent(NOW_STEPS + USUAL_STEPS)
    before, newest = recent[:, :USUAL_STEPS], recent[:, USUAL_STEPS:]
    count = (~np.isnan(before)).sum(axis=1)
    middle = np.where(np.isnan(newest).any(axis=1) | (count < LEAST_STEPS), np.nan, exact.median(newest))
    with np.errstate(invalid="ignore"):
        above = np.flatnonzero((before < middle[:, None]).sum(axis=1) > UPPER_SHARE * count)
    now = np.log(np.maximum(middle, TINY))
    usual, spread = now.copy(), np.full(len(window), SPREAD_FLOOR)
    logs = np.log(np.maximum(before[above], TINY))
    usual[above] = exact.median(logs)
    spread[above] = np.maximum(exact.spread(logs, usual[above]), SPREAD_FLOOR)
    return now, usual, spread
