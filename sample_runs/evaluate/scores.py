"""The raw signals of all detectors on all runs, computed once; every edge is tried on them afterwards."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from diagnostics.detect.bands import GROUPS, PLAIN, Band, shipped_bands
from diagnostics.detect.detector import Detector
from diagnostics.detect.detectors import DETECTORS
from diagnostics.detect.history import History, flags_of
from diagnostics.detect.window import Window

from .channel import Channel, Trace
from .corpus import Course
from .machine import Bools, Rule, Values

AT_EDGE_ONE = Band({PLAIN: 1.0})
FITTED = ("entropy-collapse", "logit-growth", "update-spike")
"""Detectors whose edges are found on the corpus. Those of the others come from public logs or from what they mean."""


def detector_channels(courses: Sequence[Course]) -> list[Channel]:
    """A channel for each detector and group of sites, named `kind` for plain sites and `kind@group` for others."""
    traces: dict[str, dict[str, Trace]] = {kind: {} for kind in DETECTORS}
    for course in courses:
        for name, trace in raw_signals(course).items():
            traces.setdefault(name, {})[course.name] = trace
    shipped = shipped_bands()
    channels = []
    for name in sorted(traces):
        kind, _, group = name.partition("@")
        detector = DETECTORS[kind](AT_EDGE_ONE)
        channels.append(
            Channel(
                name,
                traces[name],
                rule_of(detector),
                detector.conditions,
                shipped[kind].of(group or PLAIN),
                pinned=kind not in FITTED,
            )
        )
    return channels


def alarming(channels: Sequence[Channel]) -> list[Channel]:
    """Those whose findings are alarms: a finding that leaves the run's status healthy is for information."""
    return [channel for channel in channels if DETECTORS[kind_of(channel.name)].status != "healthy"]


def kind_of(name: str) -> str:
    """The detector of a channel."""
    return name.partition("@")[0]


def rule_of(detector: Detector) -> Rule:
    """The machine that a detector's scores go through."""
    return Rule(detector.needed, detector.calm, detector.refractory, detector.stay_share)


def raw_signals(course: Course) -> dict[str, Trace]:
    """Largest signal of each frame, in the detector's own units, by channel."""
    bands = shipped_bands()
    window = History().window(course.block, flags_of(course.about["sites"]))
    groups = np.array(window.groups())
    found: dict[str, Trace] = {}
    for kind, of_kind in DETECTORS.items():
        detector = of_kind(bands[kind])
        window.scores[kind] = detector.judge(window).score
        signal = detector.signal(window)
        own_judge = of_kind.judge is not Detector.judge
        if detector.over != "heads":
            judge = _judge(of_kind, window, PLAIN) if own_judge else None
            found[kind] = Trace(window.steps, _largest(signal), judge)
            continue
        for group in sorted(set(groups.tolist())):
            name = kind if group == PLAIN else f"{kind}@{group}"
            judge = _judge(of_kind, window, group) if own_judge else None
            found[name] = Trace(window.steps, _largest(signal[:, groups == group]), judge)
    return found


def _judge(of_kind: type[Detector], window: Window, group: str) -> Callable[[float], tuple[Bools, Bools]]:
    """The detector's own judgement at an edge for one group of sites; the sites of the other are never over theirs."""

    def judge(edge: float) -> tuple[Bools, Bools]:
        judged = of_kind(Band({**dict.fromkeys(GROUPS, math.inf), group: edge})).judge(window)
        return judged.start, judged.stay

    return judge


def _largest(signal: Values) -> Values:
    """(F,) over the columns, NaN where no column could be judged."""
    if not signal.shape[1]:
        return np.full(len(signal), np.nan)
    known = ~np.isnan(signal)
    return np.where(known.any(axis=1), np.where(known, signal, -np.inf).max(axis=1), np.nan)
