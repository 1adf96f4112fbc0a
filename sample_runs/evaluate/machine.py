"""The alarm machine of `diagnostics.detect.alarm` for many edges and many runs at a time.

The same rule, another layout: there one run goes by, frame after frame; here all runs at all edges move one frame
ahead together, so that every threshold can be tried in seconds. A test holds the two against each other.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
AFTER = 2**40
"""The step of a frame that is only there to fill up a row."""


@dataclass(frozen=True)
class Rule:
    """From a score to alarms: persistence, hysteresis, pause; see `diagnostics.detect.alarm.Alarm`."""

    needed: int = 1
    calm: int = 1
    refractory: int = 0
    stay_share: float = 1.0


def raised(steps: Ints, start: Bools, stay: Bools, known: Bools, rule: Rule) -> Bools:
    """Where alarms are raised.

    Args:
        steps: (C, G) the steps of the frames of C runs, ascending; `AFTER` where a run has fewer.
        start: (E, C, G) whether the condition for raising holds, at E edges.
        stay: (E, C, G) whether an active alarm is still justified.
        known: (C, G) whether they could be judged; frames where not change nothing.
        rule: of the machine.

    Returns:
        (E, C, G), True where an alarm is raised.
    """
    out = np.zeros(start.shape, dtype=np.bool_)
    shape = start.shape[:2]
    held = np.zeros(shape, dtype=np.int64)
    quiet = np.zeros(shape, dtype=np.int64)
    active = np.zeros(shape, dtype=np.bool_)
    pause_until = np.full(shape, -1, dtype=np.int64)
    for frame in range(start.shape[2]):
        here = known[:, frame]
        if not here.any():
            continue
        now = steps[:, frame]
        begins = start[:, :, frame]
        quiet = np.where(active & here, np.where(begins | stay[:, :, frame], 0, quiet + 1), quiet)
        cleared = active & here & (quiet >= rule.calm)
        held = np.where(~active & here, np.where(begins & (now > pause_until), held + 1, 0), held)
        fired = ~active & here & (held >= rule.needed)
        out[:, :, frame] = fired
        pause_until = np.where(cleared, now + rule.refractory, pause_until)
        held = np.where(cleared | fired, 0, held)
        quiet = np.where(cleared | fired, 0, quiet)
        active = (active | fired) & ~cleared
    return out
