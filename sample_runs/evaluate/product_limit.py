"""Quantiles of waiting times of which some are only known to be longer than they were watched."""

import math

import numpy as np

from diagnostics.detect.block import Bools, Values


def product_limit_quantile(times: Values, came: Bools, weights: Values, share: float) -> float:
    """The time by which `share` of all has come (Kaplan and Meier 1958); inf where fewer ever do, 0 for a share below 0.

    Args:
        times: (N,) until it came, or until nobody looked any more.
        came: (N,) which of the two.
        weights: (N,) how much each counts.
        share: 0 to 1.
    """
    if share < 0:
        return 0.0
    order = np.lexsort((~came, times))
    alive = float(weights.sum())
    surviving = 1.0
    for place in order.tolist():
        if came[place]:
            surviving *= 1 - weights[place] / alive if alive > weights[place] else 0.0
            if 1 - surviving >= share - 1e-9:
                return float(times[place])
        alive -= float(weights[place])
    return math.inf
