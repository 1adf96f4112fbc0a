"""What a detector looks at: the new frames, and what it may know of those before.

Everything is computed for all new frames at once, once for all detectors, and from nothing but the frame itself
and a bounded past: so a run judged frame by frame and judged in one go gives the same, bit for bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.detect.bands import PLAIN, QK_NORM
from diagnostics.detect.block import Block, Bools, Ints, Key, Values
from diagnostics.detect.loss_course import LossCourse
from diagnostics.detect.per_step import PerStep

GROWTH_STEPS = 50
"""Steps over which growth is taken: shorter is noise, longer is late (the corpus's best single warning)."""
HELD_STEPS = 200
HELD_FRAMES = 33


@dataclass
class Window:
    """F new frames behind N - F of the past.

    Attributes:
        block: the new frames, in the columns of `heads` and `parameters`.
        all_steps: (N,) steps of all frames held, the new ones last.
        first_step: the first step of the run.
        heads, parameters: all seen so far, sorted.
        loss: the course of the loss; grad_norm, lr, adam_rms: the other numbers of steps.
        scores: of the detectors fed before on this block, (F,) each, by name.
        memo: what a rule has worked out of this window and needs again.
    """

    block: Block
    all_steps: Ints
    first_step: int
    heads: tuple[Key, ...]
    parameters: tuple[str, ...]
    loss: LossCourse
    grad_norm: PerStep
    lr: PerStep
    adam_rms: PerStep
    columns: Mapping[str, Values]
    flags: Mapping[str, frozenset[str]]
    scores: dict[str, Values] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)
    _growths: dict[tuple[str, float, int], Values] = field(default_factory=dict)
    _flagged: dict[str, Bools] = field(default_factory=dict)
    _compared: dict[int, tuple[NDArray[np.int64], Values]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.block)

    @property
    def steps(self) -> Ints:
        """(F,) the steps that close the new frames."""
        return self.block.steps

    @property
    def age(self) -> Ints:
        """(F,) steps since the run began."""
        return self.steps - self.first_step

    def now(self, name: str) -> Values:
        """(F, H) of a column of attention or spectra, or (F, P) of `ratio` and `scale`."""
        return self.columns[name][len(self.all_steps) - len(self) :]

    def ago(self, name: str, over: int = GROWTH_STEPS) -> Values:
        """What `now` was `over` steps before each frame: at the oldest frame no older; NaN where there is none."""
        earlier, _ = self._earlier(over)
        return np.where((earlier >= 0)[:, None], self.columns[name][np.maximum(earlier, 0)], np.nan)

    def growth(self, name: str, floor: float = 0.0, over: int = GROWTH_STEPS) -> Values:
        """ln(now / `over` steps ago), values below `floor` counting as `floor`; NaN where either is missing.

        Where frames lie further apart than `over`, the growth since the last is scaled down to it. At the
        beginning it is the growth since the first frame, not scaled up.
        """
        key = (name, floor, over)
        if key not in self._growths:
            _, share = self._earlier(over)
            with np.errstate(divide="ignore", invalid="ignore"):
                now, ago = (
                    np.log(np.maximum(self.now(name), floor)),
                    np.log(np.maximum(self.ago(name, over), floor)),
                )
                grown = (now - ago) * share[:, None]
            self._growths[key] = np.where(np.isfinite(grown), grown, np.nan)
        return self._growths[key]

    def past(self, name: str, count: int) -> Values:
        """(F, count, H or P): the frames before each frame, oldest first; NaN where there were none."""
        assert count < HELD_FRAMES
        end = np.arange(len(self.all_steps) - len(self), len(self.all_steps))
        index = end[:, None] - count + np.arange(count)
        values = self.columns[name][np.maximum(index, 0)]
        return np.where((index >= 0)[:, :, None], values, np.nan)

    def flag(self, name: str) -> Bools:
        """(H,) whether the head's site has a flag: `qk_norm`, `softcap`, `sink`, `window`, `cross`, ..."""
        if name not in self._flagged:
            marked = [name in self.flags.get(layer, ()) for layer, _ in self.heads]
            self._flagged[name] = np.array(marked, dtype=np.bool_)
        return self._flagged[name]

    def groups(self) -> list[str]:
        """The group of every head, by which bands differ."""
        return [QK_NORM if QK_NORM in self.flags.get(layer, ()) else PLAIN for layer, _ in self.heads]

    def _earlier(self, over: int) -> tuple[NDArray[np.int64], Values]:
        """For each new frame the index of the frame to compare with (-1: none), and what to scale by."""
        assert over <= HELD_STEPS
        if over not in self._compared:
            self._compared[over] = self._compare_with(over)
        return self._compared[over]

    def _compare_with(self, over: int) -> tuple[NDArray[np.int64], Values]:
        here = np.arange(len(self.all_steps) - len(self), len(self.all_steps))
        earlier = np.minimum(np.searchsorted(self.all_steps, self.steps - over), here - 1)
        gap = self.steps - self.all_steps[np.maximum(earlier, 0)]
        return earlier, np.where(gap > over, over / np.maximum(gap, 1), 1.0)
