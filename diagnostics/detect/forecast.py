"""How many steps are left until the first head's attention is dead, with an interval, or that nothing heads there.

The median and the quantiles are those of a first passage (`first_passage.py`) of the soonest head (`approach.py`).
Taken at their word they are too narrow: slope and noise are estimates from a few points, and growth changes its
pace. So both ends are moved by one factor, fitted by split conformal prediction on the corpus's runs, the median by another,
and both shipped as numbers in `forecast.json` (`python -m sample_runs.evaluate.forecast_coverage` makes it).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from diagnostics.detect.approach import SIGNALS, SPAN, Approach, Rule, soonest
from diagnostics.detect.block import Values
from diagnostics.detect.window import Window

HORIZON = 1000
"""Steps: what lies further ahead than twenty times the past it is drawn from is no forecast."""
SLACK = 5
"""Steps by which a passage may be off whatever the factor: the measuring itself is no finer."""
OF_ATTENTION = ("entropy-collapse", "spectral-concentration", "logit-growth")
"""Detectors whose score may be asked for besides."""
REACH = 2 * SPAN
REACH_FRAMES = 10
"""What is looked at of the past, in steps or frames, whichever is more: enough points even where some are missing."""


@dataclass(frozen=True)
class Calibration:
    """What makes the interval honest.

    Attributes:
        confidence: share of forecasts whose interval the event falls into.
        middle: factor on the median.
        widen: factor on the upper quantile, and what the lower one is divided by.
        rule: what counts as heading there.
    """

    confidence: float = 0.8
    middle: float = 1.0
    widen: float = 1.0
    rule: Rule = field(default_factory=Rule)

    def steps_of(self, approach: Approach) -> tuple[float, float, float]:
        """Median, lower and upper end of the interval, in steps from where the approach was measured.

        They are of the measured step at which the head is first seen dead, up to a gap behind the passage itself.
        """
        tail = (1 - self.confidence) / 2
        middle = stretched(approach.quantile(0.5), self.middle) + approach.gap / 2
        low = max(0.0, stretched(approach.quantile(tail), 1 / self.widen))
        high = stretched(approach.quantile(1 - tail), self.widen) + approach.gap
        return middle, min(low, middle), max(high, middle)


def stretched(steps: float, factor: float) -> float:
    """A number of steps times a factor, as if `SLACK` steps had gone before: next to the level a factor alone does nothing."""
    return factor * (steps + SLACK) - SLACK


@cache
def shipped_calibration() -> Calibration:
    """The calibration that came with the package."""
    text = files("diagnostics.detect").joinpath("forecast.json").read_text(encoding="utf-8")
    values = json.loads(text)["calibration"]
    return Calibration(**{**values, "rule": Rule(**values["rule"])})


def forecast(window: Window, calibration: Calibration | None = None) -> dict[str, Any] | None:
    """The forecast as it stands at the window's last frame, as the report's JSON has it; None: nothing heads there.

    Null too where the loss clearly falls (a task that asks for sharp heads makes them), where every head in
    question is at its level already (that is for a finding to say), and where the median is over `HORIZON` steps ahead.
    """
    return forecast_at(window, len(window) - 1, calibration) if len(window) else None


def forecast_at(window: Window, frame: int, calibration: Calibration | None = None) -> dict[str, Any] | None:
    """The forecast as it stood at one of the window's frames."""
    calibration = calibration or shipped_calibration()
    found = approach_at(window, frame, calibration.rule)
    return None if found is None else said(*found, calibration)


def approach_at(window: Window, frame: int, rule: Rule) -> tuple[Approach, int] | None:
    """The soonest head at one of the window's frames, and how many steps ago it was last measured."""
    if rule.mute_falling and window.loss.falling[frame]:
        return None
    if rule.score > 0 and not _at_risk(window.scores, frame, rule.score):
        return None
    end = len(window.all_steps) - len(window) + frame + 1
    first = max(
        0, min(int(np.searchsorted(window.all_steps, window.all_steps[end - 1] - REACH)), end - REACH_FRAMES)
    )
    past = {signal: window.columns[signal][first:end] for signal in SIGNALS}
    # A run's last frame, and those between the steps at which attention is observed, have none.
    known = np.flatnonzero(~(np.isnan(past["max_logit"]) & np.isnan(past["entropy_frac"])).all(axis=1))
    if not len(known):
        return None
    steps = window.all_steps[first:end][known]
    found = soonest(steps, {signal: values[known] for signal, values in past.items()}, window.heads, rule)
    return None if found is None else (found, int(window.all_steps[end - 1] - steps[-1]))


def said(approach: Approach, elapsed: int, calibration: Calibration) -> dict[str, Any] | None:
    """An approach in the report's words, counted from `elapsed` steps after it was measured; None beyond the horizon."""
    middle, low, high = calibration.steps_of(approach)
    if middle - elapsed > HORIZON or high - elapsed < 1:
        return None
    return {
        "steps_to_collapse": max(1, round(middle - elapsed)),
        "low": max(0, math.floor(low - elapsed)),
        "high": math.ceil(high - elapsed),
        "confidence": calibration.confidence,
        "layer": approach.layer,
        "head": approach.head,
        "signal": approach.signal,
        "now": float(f"{approach.value:.4g}"),
        "level": approach.level,
    }


def _at_risk(scores: Mapping[str, Values], frame: int, least: float) -> bool:
    return any(name in scores and float(scores[name][frame]) >= least for name in OF_ATTENTION)
