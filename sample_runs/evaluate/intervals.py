"""Confidence intervals of shares and of rates of rare events, in closed form or by bisection."""

import math
from collections.abc import Callable

Z = 1.959963984540054
"""Two-sided 95 % of the normal distribution."""


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The Wilson score interval (95 %) of a share; (0, 1) where nothing was tried."""
    if of == 0:
        return 0.0, 1.0
    share = hits / of
    shrink = 1 + Z * Z / of
    middle = (share + Z * Z / (2 * of)) / shrink
    half = Z * math.sqrt(share * (1 - share) / of + Z * Z / (4 * of * of)) / shrink
    return max(0.0, middle - half), min(1.0, middle + half)


def poisson(count: int) -> tuple[float, float]:
    """The exact (Garwood) interval (95 %) of the mean of a Poisson count."""
    low = 0.0 if count == 0 else _mean_where(lambda mean: 1 - _at_most(count - 1, mean), 0.025, count)
    high = _mean_where(lambda mean: 1 - _at_most(count, mean), 0.975, count)
    return low, high


def _at_most(count: int, mean: float) -> float:
    """P(X <= count) of a Poisson variable."""
    if mean == 0:
        return 1.0
    return math.fsum(math.exp(k * math.log(mean) - mean - math.lgamma(k + 1)) for k in range(count + 1))


def _mean_where(rising: Callable[[float], float], target: float, count: int) -> float:
    low, high = 0.0, 10.0 + 3.0 * count
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < target else (low, middle)
    return (low + high) / 2
