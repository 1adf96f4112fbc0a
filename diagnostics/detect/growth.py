"""Growth of a head's numbers over 50 steps, such that a burst is seen at two frames however far they lie apart."""

import numpy as np

from diagnostics.detect.block import Values
from diagnostics.detect.window import GROWTH_STEPS, Window


def burst(window: Window, name: str, floor: float) -> Values:
    """(F, H) `window.growth` over 50 steps; where fewer than two frames fall into them, over 100 if that is more.

    Two frames in a row must agree on an alarm. With frames 50 steps apart, a head that dies between two of them
    would have grown at one of them only.
    """
    growth = window.growth(name, floor)
    here = np.arange(len(window.all_steps) - len(window), len(window.all_steps))
    coarse = 2 * (window.steps - window.all_steps[np.maximum(here - 1, 0)]) > GROWTH_STEPS
    if not coarse.any():
        return growth
    return np.where(coarse[:, None], np.fmax(growth, window.growth(name, floor, 2 * GROWTH_STEPS)), growth)


def burst_steps(window: Window, frame: int) -> int:
    """The steps that the growth at a frame was taken over, in words to people."""
    here = len(window.all_steps) - len(window) + frame
    gap = int(window.all_steps[here] - window.all_steps[max(here - 1, 0)])
    return min(GROWTH_STEPS if 2 * gap <= GROWTH_STEPS else 2 * GROWTH_STEPS, int(window.age[frame]))
