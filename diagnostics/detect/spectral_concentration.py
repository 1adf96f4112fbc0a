"""Spectral energy concentrating too fast: the early sign, before entropy falls and before the loss shows it.

Source: arXiv 2505.21910 (fast growth of sigma1(Wq^T Wk) and of SEC is the precursor of malignant collapse).
The level of SEC does not separate: healthy small models reach a mean of 0.8. The speed does in the
demonstration's arms: a rise of 0.4 to 0.6 of the mean within 30 steps where healthy arms take over 50.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect.alarm import Alarm
from diagnostics.detect.finding import Finding, FindingLog, in_words, rounded
from diagnostics.detect.frame import Frame
from diagnostics.detect.heads import HeadHistory

WINDOW_STEPS = 30
FAST_RISE = 0.4
"""Rise of the mean SEC(1) over all heads within the window; healthy arms stayed below 0.28."""
FAST_GROWTH = 1.5
"""Rise of ln sigma1 of the fastest head within the window, on top."""
CALM_SEC = 0.5
HEALTHY_FRAC = 0.75
ADVICE = (
    "lower the learning rate or lengthen the warmup; on the live run, `diagnostics control RUN spectral-bound --tau 0.01` "
    "keeps sigma1 from growing faster than 1 % a step"
)


class SpectralConcentration:
    """The mean SEC(1) of Wq^T Wk rises fast while sigma1 runs away (warning)."""

    def __init__(self) -> None:
        # Rates are only comparable over the same few steps: a coarser schedule than the window judges nothing.
        self._history = HeadHistory(least_steps=WINDOW_STEPS)
        self._alarm = Alarm(needed=2)
        self._log = FindingLog()

    def feed(self, frame: Frame) -> list[Finding]:
        if not self._history.add(frame):
            return []
        sec_now, sec_first = self._history.now("sec_1"), self._history.first("sec_1")
        known = ~(np.isnan(sec_now) | np.isnan(sec_first))
        if not known.any():
            return []
        rise = float(np.mean(sec_now[known]) - np.mean(sec_first[known]))
        with np.errstate(divide="ignore", invalid="ignore"):
            growth = np.log(self._history.now("sigma1")) - np.log(self._history.first("sigma1"))
        growth = np.where(np.isfinite(growth), growth, -np.inf)
        fastest = int(np.argmax(growth))
        frac = self._history.now("entropy_frac")
        spread_out = bool(np.all(np.isnan(frac))) or float(np.nanmean(frac)) >= HEALTHY_FRAC
        mean_sec = float(np.mean(sec_now[known]))
        # Once concentrated, what matters is whether attention followed: that is entropy collapse's to say.
        stay = mean_sec > CALM_SEC and not (spread_out and rise < FAST_RISE / 4)
        raised = self._alarm.see(
            frame.step, start=rise >= FAST_RISE and float(growth[fastest]) >= FAST_GROWTH, stay=stay
        )
        if self._alarm.just_cleared:
            self._log.end("spectral-concentration", frame.step)
        if not raised:
            return []
        layer, head = self._history.keys[fastest]
        factor = float(np.exp(growth[fastest]))
        evidence = {
            "mean_sec_1": rounded(mean_sec),
            "mean_sec_1_rise": rounded(rise),
            "rise_steps": self._history.span,
            "mean_sec_1_rise_healthy": f"below {FAST_RISE} in {WINDOW_STEPS} steps",
            "sigma1": rounded(self._history.now("sigma1")[fastest]),
            "sigma1_growth": rounded(factor),
            "mean_entropy_frac": None if np.all(np.isnan(frac)) else rounded(float(np.nanmean(frac))),
        }
        message = (
            f"spectral energy is concentrating fast: mean SEC rose by {in_words(rise)} to {in_words(mean_sec)} in "
            f"{self._history.span} steps; sigma1 of Wq^T Wk grew {factor:.1f}-fold in {layer or 'the model'} head {head}"
        )
        return self._log.add(
            Finding(
                "spectral-concentration", "warning", layer, head, self._alarm.onset or 0, evidence, ADVICE, message,
                status="at-risk", raised_step=frame.step,
            )
        )  # fmt: skip

    def findings(self) -> list[Finding]:
        return list(self._log)

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self._history.state_dict(),
            "alarm": self._alarm.state_dict(),
            "findings": self._log.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._history.load_state_dict(state["history"])
        self._alarm.load_state_dict(state["alarm"])
        self._log.load_state_dict(state["findings"])
