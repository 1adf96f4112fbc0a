"""The recent past of every head, aligned by layer and head, for rates of growth."""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect.frame import Frame, Values

Key = tuple[str, int]

_COLUMNS = ("entropy", "entropy_frac", "max_logit", "rank_frac")
_SPECTRAL = ("sec_1", "sigma1")


class HeadHistory:
    """Frames of the last steps as aligned arrays, NaN where a head was not measured.

    Args:
        least_steps: how far back the window reaches at least.
        share: it reaches back this share of the run's steps, should that be more.
    """

    def __init__(self, *, least_steps: int, share: float = 0.0) -> None:
        self._least_steps = least_steps
        self._share = share
        self._frames: deque[tuple[int, dict[str, Values]]] = deque()
        self.keys: tuple[Key, ...] = ()

    def add(self, frame: Frame) -> bool:
        """Takes a frame; False where it holds no heads."""
        if not frame.attention and not frame.spectra:
            return False
        keys = tuple(dict.fromkeys((*frame.attention.keys, *frame.spectra.keys)))
        if keys != self.keys:
            # Other heads than before: a layer was added or replaced, and there is no past to compare with.
            self._frames.clear()
            self.keys = keys
        values = {
            name: _aligned(frame.attention.keys, frame.attention.column(name), keys) for name in _COLUMNS
        }
        values |= {name: _aligned(frame.spectra.keys, frame.spectra.column(name), keys) for name in _SPECTRAL}
        self._frames.append((frame.step, values))
        window = max(self._least_steps, int(frame.step * self._share))
        while self._frames[0][0] < frame.step - window:
            self._frames.popleft()
        return True

    @property
    def span(self) -> int:
        """Steps between the oldest and the newest frame."""
        return self._frames[-1][0] - self._frames[0][0] if self._frames else 0

    def now(self, name: str) -> Values:
        return self._frames[-1][1][name]

    def first(self, name: str) -> Values:
        return self._frames[0][1][name]

    def state_dict(self) -> dict[str, Any]:
        return {
            "keys": [list(key) for key in self.keys],
            "frames": [
                (step, {name: v.tolist() for name, v in values.items()}) for step, values in self._frames
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.keys = tuple((str(layer), int(head)) for layer, head in state["keys"])
        self._frames = deque(
            (step, {name: np.array(v, dtype=np.float64) for name, v in values.items()})
            for step, values in state["frames"]
        )


def _aligned(keys: tuple[Any, ...], values: Values, wanted: tuple[Any, ...]) -> Values:
    if keys == wanted:
        return values
    by_key = dict(zip(keys, values, strict=True))
    return np.array([by_key.get(key, np.nan) for key in wanted], dtype=np.float64)
