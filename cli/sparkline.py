"""A series as a line of bars."""

import math
from collections.abc import Sequence
from itertools import pairwise

from .progress import Over, Series

_BARS = "▁▂▃▄▅▆▇█"


def sparkline(
    series: Series, points: int = 40, over: Over = "max", steps: tuple[int, int] | None = None
) -> str:
    """The series as bars between its own smallest and largest value; a gap for null, `!` where not finite.

    A value stands until the next one is due, so that series which are measured every ten steps and every step can
    be read one below the other.

    Args:
        series: values by step, in step order.
        points: how many bars at most; more steps are cut into as many stretches of equal length.
        over: what a bar shows of its stretch.
        steps: the first and the last step drawn; None: those of the series.
    """
    if not series:
        return ""
    first, last = steps or (next(iter(series)), next(reversed(series)))
    values = _stretches(series, first, last, min(points, last - first + 1), over)
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    return "".join(_bar(value, low, high - low) for value in values)


def _stretches(series: Series, first: int, last: int, points: int, over: Over) -> list[float | None]:
    known = {step: value for step, value in series.items() if value is not None and first <= step <= last}
    if not known:
        return [None] * points
    apart = sorted(after - before for before, after in pairwise(known))
    due = apart[len(apart) // 2] if apart else 1
    span = last - first + 1
    stretches: list[list[float]] = [[] for _ in range(points)]
    newest = [first] * points
    for step, value in known.items():
        index = (step - first) * points // span
        stretches[index].append(value)
        newest[index] = step
    told: list[float | None] = []
    until = first  # the step from which on the last value is overdue
    for index, values in enumerate(stretches):
        if values:
            told.append(_one(values, over))
            until = newest[index] + due
        else:
            told.append(told[-1] if told and first + index * span / points < until else None)
    return told


def _one(values: Sequence[float], over: Over) -> float | None:
    if not values:
        return None
    if not all(map(math.isfinite, values)):
        return math.nan
    if over == "mean":
        return math.fsum(values) / len(values)
    return min(values) if over == "min" else max(values)


def _bar(value: float | None, low: float, span: float) -> str:
    if value is None:
        return " "
    if not math.isfinite(value):
        return "!"
    return _BARS[min(len(_BARS) - 1, int((value - low) / span * len(_BARS)))] if span > 0.0 else _BARS[0]
