"""What became of a logged run, from its loss alone.

The rule was first written without looking at alarms. Three things were changed after looking at some: short jumps
count as spikes (a third to a half of the false alarms of rules on the loss stood on them), a loss within half the margin
is a normal one when an onset is dated, and a loss that halved has learned something.

- The level at a point is the lower quartile of the last W = max(20, n / 40) losses of n. The quartile and not the
  median: with mixup the losses of a healthy run come in two kinds, and the median jumps between them.
- An excursion begins where the level exceeds the best level before by max(0.3, 0.25 |best|), and ends where it is
  back within half of that.
- crash: an excursion that lasts for a tenth of the run, or to its end. spike-recovered: all that are shorter, and
  five losses in a row of which each is higher than the highest of the W before them by the same margin: such jumps
  often heal within a dozen points, too few to lift the quartile.
- never-learned: from a tenth of the run on the level never falls by another 10 %, and all in all not to half of the
  first losses (their median).
- The onset of an excursion is its first exceedance, not the point at which a window of W confirms it: the first loss
  beyond the limit after the last one within half the margin. A noisy loss beyond the limit with normal ones after
  it is not the onset.
"""

from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .corpus import CRASH, HEALTHY, NEVER, SPIKE
from .machine import Bools, Values

LEAST_WINDOW = 20
WINDOWS_IN_RUN = 40
QUARTILE = 0.25
RISE_ABSOLUTE = 0.3
RISE_RELATIVE = 0.25
LASTING_SHARE = 0.1
LEARNING_SHARE = 0.9
LEARNED_SHARE = 0.5
FIRST_POINTS = 5
JUMP_POINTS = 5


@dataclass(frozen=True)
class Excursion:
    """Points: of the first exceedance, of its confirmation, and how many it lasts from there; whether to the end."""

    onset: int
    confirmed: int
    lasts: int
    to_the_end: bool


@dataclass(frozen=True)
class Label:
    """What became of a run, with the point of the onset (None where there is none)."""

    label: str
    onset: int | None


def label_of(losses: Values) -> Label:
    """The label of a run by the losses of its points; losses that are not finite count as infinitely high."""
    found = excursions(losses)
    for one in found:
        if one.to_the_end or one.lasts >= LASTING_SHARE * len(losses):
            return Label(CRASH, one.onset)
    if never_learned(losses):
        return Label(NEVER, None)
    spikes = [*(one.onset for one in found), *jumps(losses)]
    return Label(SPIKE, min(spikes)) if spikes else Label(HEALTHY, None)


def excursions(losses: Values) -> list[Excursion]:
    """All rises of the level, in their order."""
    values = _numbers(losses)
    level, best_before = _levels(values)
    known = np.isfinite(best_before)
    best = np.where(known, best_before, 0.0)
    margin = np.maximum(RISE_ABSOLUTE, RISE_RELATIVE * np.abs(best))
    over: Bools = known & (level > best + margin)
    half: Bools = known & (level > best + margin / 2)
    found = []
    point = 0
    while over[point:].any():
        point += int(np.argmax(over[point:]))
        back = np.flatnonzero(~half[point:])
        lasts = int(back[0]) if len(back) else len(values) - point
        onset = _first_exceedance(values, point, float(best[point]), float(margin[point]))
        found.append(Excursion(onset, point, lasts, not len(back)))
        point += lasts
    return found


def jumps(losses: Values) -> list[int]:
    """The points at which five losses in a row begin that stand above all of the window before."""
    values = _numbers(losses)
    window = window_of(len(values))
    if len(values) < window + JUMP_POINTS:
        return []
    _, best_before = _levels(values)
    points = np.arange(window, len(values) - JUMP_POINTS + 1)
    highest = sliding_window_view(values, window)[: len(points)].max(axis=1)
    lowest = sliding_window_view(values, JUMP_POINTS)[window:].min(axis=1)
    best = best_before[points]
    known = np.isfinite(best) & np.isfinite(highest)
    margin = np.maximum(RISE_ABSOLUTE, RISE_RELATIVE * np.abs(np.where(known, best, 0.0)))
    with np.errstate(invalid="ignore"):
        found: list[int] = points[known & (lowest > highest + margin)].tolist()
    return found


def never_learned(losses: Values) -> bool:
    """Whether the loss stayed where it was after the first tenth of the run, and that is not far below its start."""
    values = _numbers(losses)
    level, _ = _levels(values)
    if not np.isfinite(level).any():
        return True
    early = level[min(max(window_of(len(values)), len(values) // 10), len(values) - 1)]
    first = float(np.median(values[:FIRST_POINTS]))
    return bool(level.min() > LEARNING_SHARE * early and level.min() > LEARNED_SHARE * first)


def window_of(points: int) -> int:
    """Points over which the level is taken."""
    return max(LEAST_WINDOW, points // WINDOWS_IN_RUN)


def _levels(values: Values) -> tuple[Values, Values]:
    """The level at each point (infinite before the first window is full), and the best before it."""
    window = window_of(len(values))
    padded = np.concatenate([np.full(window - 1, np.inf), values])
    level = np.sort(sliding_window_view(padded, window), axis=1)[:, int(QUARTILE * window)]
    level[: min(window - 1, len(level))] = np.inf
    return level, np.minimum.accumulate(np.concatenate([[np.inf], level]))[:-1]


def _first_exceedance(values: Values, confirmed: int, best: float, margin: float) -> int:
    begin = max(0, confirmed - window_of(len(values)) + 1)
    normal = np.flatnonzero(values[begin : confirmed + 1] <= best + margin / 2)
    begin += int(normal[-1]) + 1 if len(normal) else 0
    return begin + int(np.argmax(values[begin : confirmed + 1] > best + margin))


def _numbers(losses: Values) -> Values:
    return np.where(np.isfinite(losses), losses, np.inf)
