"""How a finding names the healthy band that a number left."""

from collections.abc import Callable

import numpy as np

from diagnostics.detect.bands import Band


def below(band: Band, edge: float, words: Callable[[float], str]) -> str:
    """The band in words: the edge, and how far healthy runs went where that is known and says something.

    Args:
        band: the detector's band.
        edge: the edge that the number was held against.
        words: a signal's value in words, unit included.
    """
    largest = band.healthy.get("max", 0.0)
    # A signal that its conditions hold at 0 in healthy runs went nowhere there: true, but no band.
    if 0.0 < largest < edge:
        return f"below {words(edge)}; healthy runs reached {words(largest)}"
    return f"below {words(edge)}"


def fold(over_steps: int) -> Callable[[float], str]:
    """Words for a growth in nats over so many steps."""
    return lambda nats: f"{np.exp(nats):.1f}-fold in {over_steps} steps"
