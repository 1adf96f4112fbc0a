"""Signals that no detector reads, each as a simple detector of its own: do they earn a place?"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from .channel import Channel, Trace
from .corpus import Course
from .machine import Ints, Rule, Values

RULE = Rule(needed=2, calm=3, refractory=100, stay_share=0.5)
"""What detectors have unless they say otherwise."""
GROWTH_STEPS = 50


def candidate_channels(courses: Sequence[Course]) -> list[Channel]:
    """A channel for each candidate that any run recorded."""
    channels = []
    for name, signal in CANDIDATES.items():
        traces = {course.name: Trace(course.block.steps, signal(course)) for course in courses}
        traces = {run: trace for run, trace in traces.items() if np.isfinite(trace.values).any()}
        if traces:
            channels.append(Channel(name, traces, RULE))
    return channels


def _at_frames(course: Course, scalar: str) -> Values:
    """(F,) the scalar at the step that closes each frame."""
    return course.block.scalar(scalar)[course.block.ends - 1]


def _rank(scalar: str) -> Callable[[Course], Values]:
    return lambda course: 1 / np.maximum(_at_frames(course, scalar), 1e-4)


def _kurtosis_growth(course: Course) -> Values:
    return growth(course.block.steps, _at_frames(course, "kurtosis"))


def _second_moment(course: Course) -> Values:
    return np.maximum(_at_frames(course, "adam_rms"), 0.0)


def _entropy_gap(course: Course) -> Values:
    """One over the least that any head's entropy lies above its lower bound, nats."""
    gap = course.block.head_column("entropy") - course.block.head_column("entropy_bound")
    known = ~np.isnan(gap)
    least = np.where(known, gap, np.inf).min(axis=1, initial=np.inf)
    return np.where(known.any(axis=1), 1 / np.maximum(least, 1e-4), np.nan)


def growth(steps: Ints, values: Values) -> Values:
    """ln(now / some 50 steps ago), 0 where it falls; since the first frame early on."""
    earlier = np.searchsorted(steps, steps - GROWTH_STEPS)
    with np.errstate(divide="ignore", invalid="ignore"):
        grown = np.log(values) - np.log(values[earlier])
    return np.where(np.isnan(grown), np.nan, np.maximum(grown, 0.0))


CANDIDATES: Mapping[str, Callable[[Course], Values]] = {
    "mean rank of the query-key update below a level": _rank("qk_update_rank"),
    "lowest rank of the query-key update below a level": _rank("qk_update_rank_min"),
    "growth of the largest kurtosis": _kurtosis_growth,
    "RMS of g / sqrt(v) above a level": _second_moment,
    "entropy less its bound below a level": _entropy_gap,
}
"""By name what is made of a run, (F,); larger is worse."""
