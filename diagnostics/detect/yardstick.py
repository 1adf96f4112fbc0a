"""What a number is held against: its own level a little before, and of itself only what lasts.

Two measurements in a row are five steps apart in one run and one in another, where the momentum alone carries a single
bad batch over. So a number counts with the lowest it had within 15 steps, and its yardstick is from before
the measurement before it and those 15 steps: the two in a row that an alarm needs are never their own yardstick.
"""

from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from diagnostics.detect.block import Bools, Ints, Values
from diagnostics.detect.window import Window

LASTING_STEPS = 15
PAST = 8
"""Measurements of a yardstick; fewer than `LEAST_KNOWN` of them are none."""
LEAST_KNOWN = 4
REACH = PAST + LASTING_STEPS
"""Frames before a frame that are looked at: its yardstick, and at most one for every step between."""
_NEVER = -(10**9)
_T = TypeVar("_T", bound=np.generic)


class Lookback(NamedTuple):
    """Where to look, as rows of an array that begins `REACH` frames before the window's first new one.

    Attributes:
        here: (F,) the new frames.
        lasting: (F, LASTING_STEPS) those up to 14 before each, itself first; near: which of them lie within 15 steps.
        past: (F, PAST) those of its yardstick.
    """

    here: Ints
    lasting: Ints
    near: Bools
    past: Ints

    @classmethod
    def of(cls, window: Window) -> "Lookback":
        if cls.__name__ not in window.memo:
            window.memo[cls.__name__] = cls._of(window)
        found: Lookback = window.memo[cls.__name__]
        return found

    @classmethod
    def _of(cls, window: Window) -> "Lookback":
        steps = with_past(window.all_steps[:, None], window, _NEVER)[:, 0]
        here = REACH + np.arange(len(window))
        lasting = here[:, None] - np.arange(LASTING_STEPS)
        near = steps[lasting] > window.steps[:, None] - LASTING_STEPS
        behind = np.searchsorted(steps, steps[here - 1] - LASTING_STEPS, side="right")
        past = np.maximum(behind[:, None] - PAST + np.arange(PAST), 0)
        return cls(here, lasting, near, past)

    def lowest(self, values: Values) -> Values:
        """(F, K) of (REACH + F, K): the lowest within 15 steps of what is known."""
        lowest = values[self.here]
        for back in range(1, LASTING_STEPS):
            near = self.near[:, back]
            if not near.any():
                break
            lowest[near] = np.fmin(lowest[near], values[self.lasting[near, back]])
        return lowest


def with_past(values: NDArray[_T], window: Window, nothing: float = np.nan) -> NDArray[_T]:
    """(REACH + F, K) of a column held in (N, K): `nothing` before the first frame of the run."""
    first = len(values) - len(window) - REACH
    before = np.full((max(0, -first), values.shape[1]), nothing, dtype=values.dtype)
    return np.concatenate([before, values[max(0, first) :]])


def began(window: Window, first_step: int, step: int) -> int:
    """First of the measured steps that made an alarm's condition hold at `first_step`; raised at `step`."""
    if step - first_step > 10 * LASTING_STEPS:
        return first_step
    return int(window.all_steps[np.searchsorted(window.all_steps, first_step - LASTING_STEPS, side="right")])
