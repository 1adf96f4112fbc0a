"""Whether forecasts come true as often as they say: coverage on runs whose family the interval was not fitted on.

The event can be read off the tables: the first head that was alive through the window of the forecast reaches a
level at which attention is dead (`diagnostics/detect/approach.py`). A forecast whose interval reaches beyond the
end of its run, with no event until there, is open: neither right nor wrong, left out and counted. Forecasts of
one run at neighbouring steps are one observation rather than many, so every run weighs the same.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.detect.approach import SIGNALS, SPAN, Approach, Rule, dead
from diagnostics.detect.bands import Bands, shipped_bands
from diagnostics.detect.block import Bools, Ints, Values
from diagnostics.detect.detectors import DETECTORS
from diagnostics.detect.forecast import HORIZON, SLACK, Calibration, approach_at
from diagnostics.detect.history import History, flags_of
from diagnostics.detect.window import Window

from .corpus import Course, load_corpus
from .product_limit import product_limit_quantile

SHIPPED = Path(__file__).resolve().parents[2] / "diagnostics" / "detect" / "forecast.json"
CONFIDENCE = 0.8
LARGEST = 8.0
"""No factor beyond this either way: an interval wider than that says nothing."""


@dataclass(frozen=True)
class Issued:
    """One forecast, and what came.

    Attributes:
        run, family: of which run; step: issued at this measured step.
        approach: what was seen.
        came: steps until the event, inf where it did not come within the run; left: steps the run went on.
    """

    run: str
    family: str
    step: int
    approach: Approach
    came: float
    left: float


@dataclass(frozen=True)
class Judged:
    """A forecast with the steps that were said."""

    issued: Issued
    middle: float
    low: int
    high: int

    @property
    def inside(self) -> bool:
        return self.low <= self.issued.came <= self.high

    @property
    def open(self) -> bool:
        """Whether the run ended before the interval did, without the event."""
        return math.isinf(self.issued.came) and self.issued.left < self.high


@dataclass(frozen=True)
class Coverage:
    """How forecasts did; shares weigh every run the same.

    Attributes:
        runs, forecasts: how many were judged; open: how many forecasts the run was too short for.
        covered: share of the decided ones whose interval held the event; early, late: shares outside, where late is
            later than `high` or never; never: share where it did not come at all.
        floor: share covered if every open one were wrong.
        pinball: mean pinball loss in steps of low, median and high where the event came.
        width: median of high / low; span: median of high - low, in steps.
        median: median of steps_to_collapse.
    """

    runs: int = 0
    forecasts: int = 0
    open: int = 0
    covered: float = math.nan
    early: float = math.nan
    late: float = math.nan
    never: float = math.nan
    floor: float = math.nan
    pinball: float = math.nan
    width: float = math.nan
    span: float = math.nan
    median: float = math.nan


def watched(course: Course, bands: Bands) -> tuple[Window, Bools]:
    """The window on a whole course with every detector's scores, and the frames at which it has collapsed or diverged.

    There the report has a finding and no forecast, as `Monitor` has it.
    """
    window = History().window(course.block, flags_of(course.about["sites"]))
    over = np.zeros(len(window), dtype=np.bool_)
    for kind, of_kind in DETECTORS.items():
        detector = of_kind(bands[kind])
        detector.feed(window)
        for finding in detector.findings():
            if finding.status in ("collapsed", "diverged"):
                last = math.inf if finding.last_step is None else finding.last_step
                over |= (window.steps >= (finding.raised_step or 0)) & (window.steps < last)
    return window, over


def issued(window: Window, over: Bools, run: str, family: str, rule: Rule) -> list[Issued]:
    """Every forecast of one run.

    Args:
        window: on the whole of it.
        over: (F,) where nothing is forecast any more.
        run: its name.
        family: its family.
        rule: what counts as heading there.
    """
    steps, gone, measured = _events(window, rule)
    found = []
    for frame in np.flatnonzero(measured & ~over).tolist():
        seen = approach_at(window, frame, rule)
        if seen is None:
            continue
        step = int(steps[frame])
        recent = (steps <= step) & (steps >= step - SPAN)
        alive = ~gone[recent].any(axis=0)
        later = np.flatnonzero((gone & alive).any(axis=1) & (steps > step))
        came = float(steps[later[0]] - step) if len(later) else math.inf
        left = float(steps[measured][-1] - step)
        if left > 0 and seen[0].quantile(0.5) <= HORIZON:
            found.append(Issued(run, family, step, seen[0], came, left))
    return found


def _events(window: Window, rule: Rule) -> tuple[Ints, Bools, Bools]:
    past = {signal: window.now(signal) for signal in SIGNALS}
    unknown = np.isnan(past["max_logit"]) & np.isnan(past["entropy_frac"])
    measured = np.asarray(~unknown.all(axis=1))
    return window.steps, dead(past, rule), measured


def fitted(forecasts: Sequence[Issued], rule: Rule, confidence: float = CONFIDENCE) -> Calibration:
    """The factors that make intervals cover on these runs, by split conformal prediction (Romano et al. 2019).

    The score of a forecast is the factor by which its interval must be widened to hold the event. Where the run
    ended first it is only known to be larger: the product-limit estimate takes that in. The level is corrected for
    the number of runs as conformal prediction has it, (n + 1) / n.
    """
    runs = len({forecast.run for forecast in forecasts})
    if not runs:
        return Calibration(confidence=confidence, rule=rule)
    tail = (1 - confidence) / 2
    late = np.array([_ratio(f, 0.5, gaps=0.5) for f in forecasts])
    outside = np.array([max(_ratio(f, 1 - tail, gaps=1.0), 1 / _ratio(f, tail, gaps=0.0)) for f in forecasts])
    # Beyond 1 with few runs: not known, so the widest.
    share = confidence * (runs + 1) / runs
    return Calibration(
        confidence=confidence,
        middle=_factor(forecasts, late, 0.5),
        widen=_factor(forecasts, outside, share),
        rule=rule,
    )


def _ratio(forecast: Issued, quantile: float, gaps: float) -> float:
    """When the event came, or the run ended, in units of what the law says; `gaps` between measured steps off it."""
    time = min(forecast.came, forecast.left) - gaps * forecast.approach.gap
    return (max(time, 0.0) + SLACK) / (forecast.approach.quantile(quantile) + SLACK)


def _factor(forecasts: Sequence[Issued], scores: Values, share: float) -> float:
    came = np.array([math.isfinite(f.came) for f in forecasts])
    value = product_limit_quantile(scores, came, _weights(forecasts), share)
    return float(f"{min(max(value, 1 / LARGEST), LARGEST):.3g}")


def judged(forecasts: Sequence[Issued], calibration: Calibration) -> list[Judged]:
    """What a calibration would have said, beside what came."""
    result = []
    for forecast in forecasts:
        middle, low, high = calibration.steps_of(forecast.approach)
        result.append(Judged(forecast, middle, math.floor(low), math.ceil(high)))
    return result


def coverage(all_judged: Sequence[Judged], confidence: float = CONFIDENCE) -> Coverage:
    """How often what was said came true."""
    if not all_judged:
        return Coverage()
    decided = [one for one in all_judged if not one.open]
    known = [one for one in decided if math.isfinite(one.issued.came)]
    tail = (1 - confidence) / 2
    losses = [
        _pinball(one.issued.came, at, level)
        for one in known
        for at, level in ((one.low, tail), (one.middle, 0.5), (one.high, 1 - tail))
    ]
    return Coverage(
        runs=len({one.issued.run for one in decided}),
        forecasts=len(decided),
        open=len(all_judged) - len(decided),
        covered=_share(decided, [one.inside for one in decided]),
        early=_share(decided, [one.issued.came < one.low for one in decided]),
        late=_share(decided, [one.issued.came > one.high for one in decided]),
        never=_share(decided, [math.isinf(one.issued.came) for one in decided]),
        floor=_share(all_judged, [one.inside for one in all_judged]),
        pinball=float(np.mean(losses)) if losses else math.nan,
        width=float(np.median([one.high / max(one.low, 1) for one in all_judged])),
        span=float(np.median([one.high - one.low for one in all_judged])),
        median=float(np.median([one.middle for one in all_judged])),
    )


def held_out(forecasts: Sequence[Issued], rule: Rule, by: str = "family") -> dict[str, Coverage]:
    """Coverage of each family (or `run`) with the factors fitted on all others, and under `all` of these together."""
    rows: dict[str, Coverage] = {}
    together: list[Judged] = []
    for group in sorted({str(getattr(f, by)) for f in forecasts}):
        calibration = fitted([f for f in forecasts if getattr(f, by) != group], rule)
        these = judged([f for f in forecasts if getattr(f, by) == group], calibration)
        rows[group] = coverage(these)
        together += these
    return {**rows, "all": coverage(together)}


def _pinball(came: float, at: float, level: float) -> float:
    return max(level * (came - at), (level - 1) * (came - at))


def _weights(forecasts: Sequence[Issued]) -> Values:
    """One for each run, shared among its forecasts."""
    counts = Counter(f.run for f in forecasts)
    return np.array([1 / counts[f.run] for f in forecasts])


def _share(some: Sequence[Judged], hits: Sequence[bool]) -> float:
    if not some:
        return math.nan
    weights = _weights([one.issued for one in some])
    return float(weights[np.array(hits, dtype=np.bool_)].sum() / weights.sum())


def to_ship(courses: Sequence[Course], rule: Rule) -> dict[str, Any]:
    """What forecast.json holds: the factors fitted on all courses, with the bands as they ship now, and on how much."""
    bands = shipped_bands()
    found = [
        one for course in courses for one in issued(*watched(course, bands), course.name, course.family, rule)
    ]
    return {
        "calibration": asdict(fitted(found, rule)),
        "fitted_on": {"runs": len({one.run for one in found}), "forecasts": len(found), "of": len(courses)},
    }


def main() -> None:
    """Fits the factors on all courses and writes forecast.json; to be run after the bands are."""
    document = to_ship(load_corpus(), Rule())
    SHIPPED.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()
