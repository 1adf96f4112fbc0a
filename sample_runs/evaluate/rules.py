"""Signals of the rules that people use today, as their sources give them."""

from collections.abc import Callable

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from .channel import Trace
from .corpus import Course
from .machine import Values

ROLLING, FEWEST = 128, 63
CUSUM_WINDOW, CUSUM_SLACK = 50, 0.5
ZCLIP_ALPHA, ZCLIP_Z, ZCLIP_WARMUP = 0.97, 2.5, 25


def sigmas(values: Values, window: int = ROLLING, fewest: int = FEWEST) -> Values:
    """How many standard deviations each value lies above the mean of the `window` values before it.

    OLMo-core's skip-step rule: 128 values, from the run's 64th value on, threshold 6. A value that is not finite is infinitely
    far off, and counts for nothing afterwards.
    """
    mean, deviation, count = _before(values, window)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (values - mean) / deviation
    z = np.where((deviation > 0) & np.isfinite(values), z, np.where(np.isfinite(values), 0.0, np.inf))
    return np.where(count >= fewest, np.maximum(z, 0.0), np.nan)


def cusum(values: Values) -> Values:
    """Page's one-sided sum of standardised rises, slack 0.5, against the 50 values before; textbook threshold 5."""
    z = _standardised(values)
    out = np.full(len(values), np.nan)
    total = 0.0
    for place, rise in enumerate(z.tolist()):
        if not np.isnan(rise):
            total = max(0.0, total + rise - CUSUM_SLACK)
            out[place] = total
    return out


def zclip(values: Values) -> Values:
    """ZClip's z: gradient norm against exponential averages (0.97) that take in a spike as it is clipped; threshold 2.5."""
    out = np.full(len(values), np.nan)
    seen: list[float] = []
    mean = variance = 0.0
    for place, value in enumerate(values.tolist()):
        if not np.isfinite(value):
            out[place] = np.inf if len(seen) >= ZCLIP_WARMUP else np.nan
            continue
        if len(seen) < ZCLIP_WARMUP:
            seen.append(value)
            mean, variance = float(np.mean(seen)), float(np.var(seen))
            continue
        deviation = variance**0.5
        z = (value - mean) / (deviation + 1e-6)
        out[place] = max(z, 0.0)
        taken = mean + ZCLIP_Z * deviation * ZCLIP_Z / z if z > ZCLIP_Z else value
        mean = ZCLIP_ALPHA * mean + (1 - ZCLIP_ALPHA) * taken
        variance = ZCLIP_ALPHA * variance + (1 - ZCLIP_ALPHA) * (taken - mean) ** 2
    return out


def of_steps(course: Course, values: Values) -> Trace:
    """A signal with a value for every step."""
    return Trace(course.block.every_step, values)


def of_frames(course: Course, table: Values, reduce: Callable[[Values], Values]) -> Trace:
    """A signal out of an (F, H) column: `reduce` is given the frames in which any head was seen."""
    seen = ~np.isnan(table).all(axis=1)
    values = np.full(len(table), np.nan)
    values[seen] = reduce(table[seen])
    return Trace(course.block.steps, values)


def _standardised(values: Values) -> Values:
    mean, deviation, count = _before(values, CUSUM_WINDOW)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = (values - mean) / deviation
    z = np.where(np.isfinite(values), np.where(deviation > 0, z, 0.0), np.inf)
    return np.where(count >= CUSUM_WINDOW // 2, z, np.nan)


def _before(values: Values, window: int) -> tuple[Values, Values, Values]:
    """Mean, standard deviation (n - 1) and number of the finite values among the `window` before each."""
    finite = np.where(np.isfinite(values), values, np.nan)
    padded = np.concatenate([np.full(window, np.nan), finite])
    past = sliding_window_view(padded, window)[: len(values)]
    known = ~np.isnan(past)
    count = known.sum(axis=1).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = np.where(known, past, 0.0).sum(axis=1) / count
        squares = np.where(known, past - mean[:, None], 0.0) ** 2
        deviation = np.sqrt(squares.sum(axis=1) / (count - 1))
    return mean, deviation, count
