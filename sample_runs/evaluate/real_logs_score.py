"""How alarms on logged runs are scored, and how a threshold is frozen on other submissions.

A point of a log counts as a step. Alarms no more than `MERGE` points after the one before belong to its episode.
False alarms are counted on healthy runs only; a crash is warned of by an alarm in the `HORIZON` points before its
onset, and noticed by one up to a few points after it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .channel import edge_of
from .corpus import CRASH, HEALTHY, NEVER
from .figures import BUDGET
from .intervals import poisson, wilson
from .machine import Ints, Values
from .real_logs_label import Label
from .scoring import episodes

HORIZON = 100
AFTER = (5, 20)
"""Points after the onset within which a crash counts as noticed."""
POWERS = range(-8, 120)
"""Lattice powers of the edges that are tried: from below a half to some 80,000."""

Alarms = Sequence[int]


@dataclass(frozen=True)
class Log:
    """One logged run, a point a step.

    Attributes:
        name: path of the trial in its repository; submission: the folder above its studies, which is held out as a whole.
        losses, grad_norms: (n,) of its points.
        label: from the loss alone.
    """

    name: str
    submission: str
    losses: Values
    grad_norms: Values
    label: Label


@dataclass(frozen=True)
class Rule:
    """Alarms at any edge: `alarms(log, edge)` gives the points at which they are raised.

    `published`: the edge it is known with, or ships with.
    """

    name: str
    alarms: Callable[[Log, float], Alarms]
    published: float | None = None


def at_or_above(signal: Callable[[Log], Values]) -> Callable[[Log, float], Alarms]:
    """The alarms of a signal: wherever it is at or above the edge. Every log's signal is computed once."""
    known: dict[str, tuple[Ints, Values]] = {}

    def alarms(log: Log, edge: float) -> Alarms:
        if log.name not in known:
            values = np.nan_to_num(signal(log), nan=-np.inf, posinf=np.inf, neginf=-np.inf)
            # Below the lowest edge nothing is ever asked for.
            points = np.flatnonzero(values >= edge_of(POWERS[0]))
            known[log.name] = points, values[points]
        points, values = known[log.name]
        found: list[int] = points[values >= edge].tolist()
        return found

    return alarms


def figures(logs: Sequence[Log], alarms: Mapping[str, Alarms]) -> dict[str, Any]:
    """What alarms (points by name of the log) were worth."""
    healthy = [log for log in logs if log.label.label == HEALTHY]
    crashes = [log for log in logs if log.label.label == CRASH]
    begun = {log.name: episodes(alarms[log.name]) for log in healthy}
    false = sum(len(begins) for begins in begun.values())
    alarmed = sum(bool(begins) for begins in begun.values())
    points = sum(len(log.losses) for log in healthy)
    leads = [_lead(log, alarms[log.name]) for log in crashes]
    low, high = poisson(false)
    never = [log for log in logs if log.label.label == NEVER]
    per = 1000 / max(points, 1)
    return {
        "failing": len(crashes),
        "before_onset": sum(lead > 0 for lead in leads),
        **{
            f"within_{after}_after": sum(_noticed(log, alarms[log.name], after) for log in crashes)
            for after in AFTER
        },
        "lead_median": float(np.median(leads)) if leads else 0.0,
        "never_learned": len(never),
        "never_learned_named": sum(bool(alarms[log.name]) for log in never),
        "false_episodes": false,
        "points": points,
        "false_per_1000": round(false * per, 4),
        "false_per_1000_interval": [round(low * per, 4), round(high * per, 4)],
        "healthy": len(healthy),
        "healthy_alarmed": alarmed,
        "healthy_share_interval": [round(share, 4) for share in wilson(alarmed, len(healthy))],
    }


def frozen_on_others(logs: Sequence[Log], rule: Rule) -> tuple[dict[str, Alarms], dict[str, float]]:
    """The alarms of every log at the edge frozen on all other submissions, and the edges by submission held out.

    The edge is the lowest of the lattice from which on the healthy runs of each other submission by itself stay
    within the budget: submissions differ more than runs, and the next one is not to be the first that goes beyond it.
    """
    healthy = [log for log in logs if log.label.label == HEALTHY]
    lowest: dict[str, float] = {}
    submissions = sorted({log.submission for log in logs})
    for submission in submissions:
        own = [log for log in healthy if log.submission == submission]
        lowest[submission] = _lowest_edge(own, rule)
    alarms: dict[str, Alarms] = {}
    edges: dict[str, float] = {}
    for submission in submissions:
        edges[submission] = max(
            (edge for name, edge in lowest.items() if name != submission), default=float("inf")
        )
        for log in logs:
            if log.submission == submission:
                alarms[log.name] = rule.alarms(log, edges[submission])
    return alarms, edges


def _lowest_edge(healthy: Sequence[Log], rule: Rule) -> float:
    allowed = BUDGET / 1000 * sum(len(log.losses) for log in healthy)
    counted = sum((_false_by_power(log, rule) for log in healthy), np.zeros(len(POWERS), dtype=np.int64))
    # Episodes may merge at low edges: the first edge within the budget counts only if all above it keep to it.
    beyond = np.flatnonzero(counted > allowed)
    first = int(beyond[-1]) + 1 if len(beyond) else 0
    return edge_of(POWERS[first]) if first < len(POWERS) else float("inf")


def _false_by_power(log: Log, rule: Rule) -> Ints:
    return np.array([len(episodes(rule.alarms(log, edge_of(power)))) for power in POWERS], dtype=np.int64)


def _lead(log: Log, alarms: Alarms) -> int:
    onset = _onset(log)
    return max((onset - point for point in alarms if onset - HORIZON <= point < onset), default=0)


def _noticed(log: Log, alarms: Alarms, after: int) -> bool:
    onset = _onset(log)
    return any(onset - HORIZON <= point <= onset + after for point in alarms)


def _onset(log: Log) -> int:
    assert log.label.onset is not None
    return log.label.onset
