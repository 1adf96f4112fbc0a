"""Means and medians that come out bit for bit the same however a run is cut into blocks.

numpy's own sums go pairwise, so that a column of zeros more, or another layout, moves the last bit; and an alarm
that hangs on a last bit would be raised live and not in the replay.
"""

import numpy as np

from diagnostics.detect.block import Values


def total(values: Values) -> Values:
    """Sum over the last axis, in its order; NaN counts as nothing."""
    if not values.shape[-1]:
        return np.zeros(values.shape[:-1])
    return np.asarray(np.cumsum(np.where(np.isnan(values), 0.0, values), axis=-1)[..., -1])


def mean(values: Values) -> Values:
    """Mean over the last axis of what is not NaN; NaN where all is."""
    known = (~np.isnan(values)).sum(axis=-1)
    return np.where(known > 0, total(values) / np.maximum(known, 1), np.nan)


def median(values: Values) -> Values:
    """Median over the last axis of what is not NaN; NaN where all is."""
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    ordered = np.sort(values, axis=-1)  # NaN last
    known = (~np.isnan(values)).sum(axis=-1, keepdims=True)
    low = np.take_along_axis(ordered, np.maximum(known - 1, 0) // 2, axis=-1)
    high = np.take_along_axis(ordered, np.minimum(known // 2, values.shape[-1] - 1), axis=-1)
    return np.where(known > 0, (low + high) / 2, np.nan)[..., 0]


def spread(values: Values, middle: Values) -> Values:
    """1.4826 times the median absolute deviation from `middle`: the robust standard deviation (last axis)."""
    return 1.4826 * median(np.abs(values - middle[..., None]))


def largest(values: Values) -> Values:
    """Largest over the last axis of what is not NaN; NaN where all is."""
    if not values.shape[-1]:
        return np.full(values.shape[:-1], np.nan)
    found = np.where(np.isnan(values), -np.inf, values).max(axis=-1)
    return np.where(np.isnan(values).all(axis=-1), np.nan, found)
