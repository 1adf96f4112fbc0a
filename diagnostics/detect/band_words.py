"""How a finding names the healthy band that a number left."""

from collections.abc import Callable

import numpy as np

from diagnostics.detect.bands import Band


def below(band: Band, edge: float, words: Callable[[float], str]) -> str:
    """The band in words: where 99 % of healthy steps lie, where that is known and says something; else the edge.

    Args:
        band: the detector's band.
        edge: the edge that the number was held against.
        words: a signal's value in words, unit included.
    """
    p99 = band.healthy.get("p99", 0.0)
    # A signal that its conditions hold at 0 in healthy runs has a quantile of 0: true, but no band.
    if 0.0 < p99 < edge:
        return f"below {words(p99)} (99 % of healthy runs)"
    return f"below {words(edge)}"


def fold(over_steps: int) -> Callable[[float], str]:
    """Words for a growth in nats over so many steps."""
    return lambda nats: f"{np.exp(nats):.1f}-fold in {over_steps} steps"
