"""The course of the loss as detectors see it at the end of each frame: level, best so far, falling or not."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect import exact
from diagnostics.detect.block import Block, Bools, Ints, Values
from diagnostics.detect.per_step import PerStep

MEDIAN_STEPS = 20
LEAST_STEPS = 10
FIRST_STEPS = 5
FALL_SHARE = 0.01
FALL_SPREADS = 0.8
"""A median of 20 strays by 0.28 standard deviations, a difference of two by 0.4: this is twice that."""


class LossCourse:
    """Running medians of the loss; (F,) each, NaN where fewer than ten losses are known.

    Attributes:
        per_step: the finite losses themselves.
        median: of the last 20; spread: their robust standard deviation.
        best, best_step: lowest median so far and the step it was reached at (-1: none yet).
        first: median of the run's first five losses.
        change: relative fall of the median against 50 steps ago, positive where it falls.
        falling: whether it clearly falls: by 1 % and by 0.8 of its own spread within 50 steps.
    """

    def __init__(self) -> None:
        self.per_step = PerStep()
        self._head: list[float] = []
        self._best, self._best_step = np.inf, -1
        nothing: Values = np.empty(0)
        self.median = self.spread = self.best = self.first = self.change = nothing
        self.best_step: Ints = np.empty(0, dtype=np.int64)
        self.falling: Bools = np.empty(0, dtype=np.bool_)

    def add(self, block: Block) -> None:
        """Takes a block; `compare` completes what needs the frames before."""
        known = block.loss_given & np.isfinite(block.losses)
        self.per_step.add(block.every_step, block.losses, known, block.ends)
        recent = self.per_step.recent(MEDIAN_STEPS)
        enough = (~np.isnan(recent)).sum(axis=-1) >= LEAST_STEPS
        self.median = np.where(enough, exact.median(recent), np.nan)
        self.spread = np.where(enough, exact.spread(recent, self.median), np.nan)
        self._see_best(block)
        self._head += block.losses[known][: FIRST_STEPS - len(self._head)].tolist()
        came = self.per_step.counted + self.per_step.ends >= FIRST_STEPS
        self.first = np.where(came, np.median(self._head) if self._head else np.nan, np.nan)

    def compare(self, median_before: Values) -> None:
        """Takes the medians of 50 steps before each frame, (F,)."""
        fall = median_before - self.median
        self.change = fall / np.maximum(np.abs(median_before), 1e-12)
        with np.errstate(invalid="ignore"):
            self.falling = (self.change > FALL_SHARE) & (fall > FALL_SPREADS * self.spread)

    def _see_best(self, block: Block) -> None:
        medians = np.where(np.isnan(self.median), np.inf, self.median)
        lowest = np.minimum.accumulate(np.concatenate([[self._best], medians]))
        better = medians < lowest[:-1]
        steps = np.where(better, block.steps, -1)
        self.best_step = np.maximum.accumulate(np.concatenate([[self._best_step], steps]))[1:]
        self.best = np.where(np.isinf(lowest[1:]), np.nan, lowest[1:])
        if len(block):
            self._best, self._best_step = float(lowest[-1]), int(self.best_step[-1])

    def state_dict(self) -> dict[str, Any]:
        return {
            "per_step": self.per_step.state_dict(),
            "head": list(self._head),
            "best": self._best,
            "best_step": self._best_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.per_step.load_state_dict(state["per_step"])
        self._head = list(state["head"])
        self._best, self._best_step = float(state["best"]), int(state["best_step"])
