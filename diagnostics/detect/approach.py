"""The head that is first to reach the level at which its attention is dead: which, from where, how fast.

A head is dead where it looks at a single key of any context: its largest scaled logit has reached `logit`
(exp(20) outweighs all other keys), or its entropy has fallen to the share `entropy_frac` of the largest possible;
the levels of `entropy_collapse.py`. Both are in the tables, so that whether a forecast came true can be read off a
run. Trained networks have such heads by design: the levels are what a forecast is about, never an alarm.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diagnostics.detect.block import Bools, Ints, Key, Values
from diagnostics.detect.first_passage import first_passage_quantile
from diagnostics.detect.theil_sen import noise, theil_sen

SPAN = 50
"""Steps over which the slope is taken: the growth that warns (see README.md beside this file)."""
MOST_POINTS = 11
"""Of the points in the span: the slope takes all pairs, and neighbours of every single step tell it nothing new."""
LEAST_POINTS = 4
LEAST_SIGMA = 0.01
"""Per sqrt(step), of a log signal: few points on a line by chance do not make it certain."""
SIGNALS = ("max_logit", "entropy_frac")


@dataclass(frozen=True)
class Rule:
    """When something counts as heading there.

    Attributes:
        logit: level of the largest scaled logit at which a head's attention is dead.
        entropy_frac: level of the mean share of the largest entropy.
        within: largest factor that may be left to the level. Healthy heads grow as fast as dying ones while they are
            small; few of them go on.
        growth: least change of the log signal per `SPAN` steps, by signal.
        certainty: least drift, in its own standard errors.
        recent: steps over which the slope is taken once more; the smaller counts.
        mute_falling: whether a clearly falling loss means that nothing is wrong.
        score: least score of a detector of attention (`forecast.OF_ATTENTION`) that is needed besides; 0: none.
    """

    logit: float = 20.0
    entropy_frac: float = 0.3
    within: float = 2.0
    growth: float = 1.0
    certainty: float = 2.0
    recent: int = 20
    mute_falling: bool = True
    score: float = 1.0


@dataclass(frozen=True)
class Approach:
    """One head on its way, as a drifting Brownian motion of a log signal.

    Attributes:
        layer: module path; head: query head in it.
        signal: `max_logit` or `entropy_frac`; level: the value at which the head is dead; value: where it is now.
        distance: what is left to the level, in ln; drift: towards it, per step; sigma: per sqrt(step).
        gap: steps between the last two measured ones: the level is seen to be reached at a measured step alone.
    """

    layer: str
    head: int
    signal: str
    level: float
    value: float
    distance: float
    drift: float
    sigma: float
    gap: int

    @property
    def mean(self) -> float:
        """Expected steps to the level."""
        return self.distance / self.drift

    def quantile(self, level: float) -> float:
        """Steps within which the level is reached with probability `level`."""
        return first_passage_quantile(level, self.distance, self.drift, self.sigma)


def chosen_points(steps: Ints, span: int = SPAN) -> Ints:
    """Indices of the points to draw a line through: those of the last `span` steps, thinned to `MOST_POINTS`.

    Where frames are coarser than the span, the last `LEAST_POINTS` + 1 of them.
    """
    first = int(np.searchsorted(steps, steps[-1] - span))
    first = max(0, min(first, len(steps) - LEAST_POINTS - 1))
    held = len(steps) - first
    if held <= MOST_POINTS:
        return np.arange(first, len(steps))
    # The nearest points to an even grid, the newest and the oldest among them.
    return first + np.arange(MOST_POINTS) * (held - 1) // (MOST_POINTS - 1)


def soonest(steps: Ints, past: Mapping[str, Values], heads: Sequence[Key], rule: Rule) -> Approach | None:
    """The head expected first at its level, from its past up to now; None where none is heading there.

    Args:
        steps: (N,) measured steps, ascending, the newest last: at least those of the last `SPAN` steps.
        past: (N, H) `max_logit` and `entropy_frac` at these steps, NaN where not measured.
        heads: (layer, head) of the H columns.
        rule: what counts as heading there.
    """
    if len(steps) < LEAST_POINTS or not heads:
        return None
    points, gap = chosen_points(steps), int(steps[-1] - steps[-2])
    found: list[Approach] = []
    alive = np.asarray(~dead(past, rule)[points[0] :].any(axis=0))
    for signal in SIGNALS:
        if signal not in past:
            continue
        level = rule.logit if signal == "max_logit" else rule.entropy_frac
        upward = upward_log(signal, past[signal][points])
        found += _approaches(steps[points], upward, alive, signal, level, heads, rule, gap)
    return min(found, key=lambda approach: (approach.mean, approach.layer, approach.head), default=None)


def dead(past: Mapping[str, Values], rule: Rule) -> Bools:
    """(N, H) whether a head is at or past one of its levels; False where that was not measured."""
    gone = np.zeros(next(iter(past.values())).shape, dtype=np.bool_)
    if "max_logit" in past:
        gone |= past["max_logit"] >= rule.logit
    if "entropy_frac" in past:
        gone |= past["entropy_frac"] <= rule.entropy_frac
    return gone


def upward_log(signal: str, values: Values) -> Values:
    """The log of a signal, turned so that up is worse.

    Logits below 1 do not shape attention: growth is counted from there. An entropy of 0 has no log and is past every level.
    """
    if signal == "max_logit":
        return np.log(np.maximum(values, 1.0))
    return -np.log(np.maximum(values, 1e-6))


def _approaches(
    steps: Ints,
    upward: Values,
    alive: Bools,
    signal: str,
    level: float,
    heads: Sequence[Key],
    rule: Rule,
    gap: int,
) -> list[Approach]:
    """Those heads of one signal that are heading to its level."""
    seen = (~np.isnan(upward)).sum(axis=0) >= LEAST_POINTS
    rise = upward[-1] - upward[0]
    # Most heads of most runs stand still: the pairs are taken of those alone that did not.
    candidates = np.flatnonzero(alive & seen & ~np.isnan(upward[-1]) & ~(rise <= 0))
    if not len(candidates):
        return []
    upward = upward[:, candidates]
    long = theil_sen(steps, upward)
    late = min(int(np.searchsorted(steps, steps[-1] - rule.recent)), len(steps) - LEAST_POINTS)
    # Growth slows down on the way far more often than it speeds up: the pace is that of the last steps.
    drift = np.fmin(long, theil_sen(steps[late:], upward[late:]))
    sigma = np.maximum(noise(steps, upward, long), LEAST_SIGMA)
    error = sigma / math.sqrt(float(steps[-1] - steps[0]))
    barrier = math.log(level) if signal == "max_logit" else -math.log(level)
    near = barrier - upward[-1] <= math.log(rule.within)
    heading = near & (drift * SPAN >= rule.growth) & (drift >= rule.certainty * error)
    found = []
    for place in np.flatnonzero(heading).tolist():
        layer, head = heads[int(candidates[place])]
        now = float(upward[-1, place])
        found.append(
            Approach(
                layer=layer,
                head=head,
                signal=signal,
                level=level,
                value=math.exp(now if signal == "max_logit" else -now),
                distance=barrier - now,
                drift=float(drift[place]),
                sigma=float(sigma[place]),
                gap=gap,
            )
        )
    return found
