"""A robust straight line through few points: the median of the slopes of all pairs (Theil 1950, Sen 1968)."""

import numpy as np

from diagnostics.detect.block import Ints, Values
from diagnostics.detect.exact import median

NORMAL = 1.4826
"""Median of absolute deviations to standard deviation, for a normal distribution."""


def theil_sen(steps: Ints, values: Values) -> Values:
    """Median slope over all pairs of points, per column.

    Args:
        steps: [N] strictly ascending.
        values: [N, K]; NaN where a point was not measured.

    Returns:
        [K] change per step; NaN where fewer than two points were measured.
    """
    late, early = np.tril_indices(len(steps), k=-1)
    if not len(late):
        return np.full(values.shape[1:], np.nan)
    gaps = (steps[late] - steps[early]).astype(np.float64)[:, None]
    return median(((values[late] - values[early]) / gaps).T)


def noise(steps: Ints, values: Values, slope: Values) -> Values:
    """Robust standard deviation of what the increments leave of the slope, per sqrt(step), per column.

    From neighbouring points only, as for a Brownian motion: an increment over a gap of n steps has n times the variance of one.

    Args:
        steps: [N] strictly ascending.
        values: [N, K].
        slope: [K] change per step.

    Returns:
        [K]; NaN where no two neighbouring points were measured.
    """
    if len(steps) < 2:  # noqa: PLR2004 - an increment has two ends
        return np.full(values.shape[1:], np.nan)
    gaps = np.diff(steps).astype(np.float64)[:, None]
    left = (np.diff(values, axis=0) - slope * gaps) / np.sqrt(gaps)
    return NORMAL * median(np.abs(left).T)
