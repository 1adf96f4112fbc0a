"""A number of every step (the loss, the gradient norm, the learning rate), seen from the ends of frames."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect.block import Bools, Ints, Values
from diagnostics.detect.ring import Ring

KEPT = 256
"""Values of the past that are held; no rule looks back further."""


class PerStep:
    """The values known of one scalar: the new ones and those of the recent past.

    Attributes of one block, M values held of which the newest are new:
        steps, values: (M,) the steps at which the scalar is known and finite, and its values.
        begins, ends: (F,) index into them of each frame's first value, and just behind its last.
        counted: values that came before those held.
    """

    def __init__(self) -> None:
        self._steps = Ring(np.empty(0, dtype=np.int64))
        self._values = Ring(np.empty(0))
        self.counted = 0
        self.steps: Ints = np.empty(0, dtype=np.int64)
        self.values: Values = np.empty(0)
        self.begins: Ints = np.empty(0, dtype=np.int64)
        self.ends: Ints = np.empty(0, dtype=np.int64)

    def add(self, steps: Ints, values: Values, known: Bools, ends: Ints) -> None:
        """Takes a block's values; `ends` as in `Block`."""
        self.counted += max(0, len(self._steps) - KEPT)
        self._steps.keep(KEPT)
        self._values.keep(KEPT)
        before = len(self._steps)
        self.steps = self._steps.append(steps[known])
        self.values = self._values.append(values[known])
        counts = np.concatenate([[0], np.cumsum(known)])
        self.ends = before + counts[ends]
        self.begins = np.concatenate([[before], self.ends[:-1]]).astype(np.int64)

    def recent(self, count: int) -> Values:
        """(F, count): the newest values at the end of each frame, oldest first; NaN where there are fewer."""
        return self._gathered(self.ends, count)

    def before(self, count: int) -> Values:
        """(F, count): the newest values before each frame began."""
        return self._gathered(self.begins, count)

    def last(self) -> Values:
        """(F,) the newest value at the end of each frame; NaN where there is none yet."""
        return self.recent(1)[:, 0]

    def _gathered(self, ends: Ints, count: int) -> Values:
        assert count <= KEPT
        index = ends[:, None] - count + np.arange(count)
        if not len(self.values):
            return np.full(index.shape, np.nan)
        return np.where(index >= 0, self.values[np.maximum(index, 0)], np.nan)

    def state_dict(self) -> dict[str, Any]:
        self.counted += max(0, len(self._steps) - KEPT)
        self._steps.keep(KEPT)
        self._values.keep(KEPT)
        return {
            "steps": self._steps.rows.tolist(),
            "values": self._values.rows.tolist(),
            "counted": self.counted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._values = Ring(np.empty(0, dtype=np.int64)), Ring(np.empty(0))
        self._steps.append(np.array(state["steps"], dtype=np.int64))
        self._values.append(np.array(state["values"], dtype=np.float64))
        self.counted = int(state["counted"])
