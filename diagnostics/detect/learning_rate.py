"""Learning-rate jump: the rate rises far above anything the run has used, after it had settled.

Faults of the schedule (a wrong rate after a resume, a factor in the wrong place) are common and cost a run before
anything else shows. The signal is the rate over the highest one from before the climb. A climb begins where the rate
passes its highest after at least 20 steps, and 5 values, at or below it; the steps of a warmup follow each other more
closely, and the first climb of a run has nothing to be compared with. So a restart back to the old peak is no climb,
and a warmup by doubling is a row of climbs by 2. Told for 200 steps after the last rise: then it is the run's rate.

Wrong where a warmup holds a tiny rate for long before it rises (by whole epochs, say): its first rise looks the same.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diagnostics.detect.band_words import below
from diagnostics.detect.bands import PLAIN, Band
from diagnostics.detect.block import Ints, Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import Finding, in_words, rounded
from diagnostics.detect.window import Window

SETTLED_STEPS = 20
SETTLED_VALUES = 5
TOLD_STEPS = 200
ROUNDING = 1e-6
"""A schedule's arithmetic may miss its own peak by so much."""
ADVICE = (
    "is that meant? If the run was resumed, check that the scheduler's state was loaded with the optimizer's, and that "
    "the schedule counts from the step resumed at; else go back to a checkpoint from before the rise, or lower the rate"
)


class _Climbs(NamedTuple):
    """The new learning rates, (S,) each: how far above the climb's base, and that base with the step it was left at."""

    factor: Values
    rates: Values
    base: Values
    start: Ints
    highest: Values
    risen: Ints
    ordinal: Ints


class LearningRateJump(Detector):
    """Warning: the learning rate exceeds by far the highest seen before."""

    kind = "learning-rate-jump"
    over = "run"
    needed = 1

    def __init__(self, band: Band) -> None:
        super().__init__(band)
        self._highest = self._base = 0.0
        self._start = self._risen = self._ordinal = -1
        self._seen = 0

    def signal(self, window: Window) -> Values:
        factor = self._climbs(window).factor
        begins, ends = window.lr.begins, window.lr.ends
        largest = np.full((len(window), 1), np.nan)
        filled = ends > begins
        if filled.any():
            largest[filled, 0] = np.maximum.reduceat(factor, begins[filled] - begins[0])
        return largest

    def _climbs(self, window: Window) -> _Climbs:
        new = slice(int(window.lr.begins[0]), int(window.lr.ends[-1]))
        steps, rates = window.lr.steps[new], window.lr.values[new]
        highest = np.maximum.accumulate(np.concatenate([[self._highest], rates]))
        before = highest[:-1]
        rises = rates > before * (1.0 + ROUNDING)
        ordinals = self._seen + np.arange(len(rates))
        risen = np.maximum.accumulate(np.concatenate([[self._risen], np.where(rises, steps, -1)]))
        ordinal = np.maximum.accumulate(np.concatenate([[self._ordinal], np.where(rises, ordinals, -1)]))
        settled = (steps - risen[:-1] >= SETTLED_STEPS) & (ordinals - ordinal[:-1] > SETTLED_VALUES)
        climb = np.maximum.accumulate(np.where(rises & settled, np.arange(len(rates)), -1))
        known = climb >= 0
        base = np.where(known, before[np.maximum(climb, 0)], self._base)
        start = np.where(known, steps[np.maximum(climb, 0)], self._start)
        told = (base > 0.0) & (steps - risen[1:] < TOLD_STEPS)
        factor = np.where(told, rates / np.where(base > 0.0, base, 1.0), 0.0)
        return _Climbs(factor, rates, base, start, highest[1:], risen[1:], ordinal[1:])

    def feed(self, window: Window) -> list[Finding]:
        raised = super().feed(window)
        climbs = self._climbs(window)
        if len(climbs.rates):
            self._highest, self._base = float(climbs.highest[-1]), float(climbs.base[-1])
            self._start, self._risen = int(climbs.start[-1]), int(climbs.risen[-1])
            self._ordinal = int(climbs.ordinal[-1])
            self._seen += len(climbs.rates)
        return raised

    def describe(self, window: Window, frame: int, column: int) -> Words:  # noqa: ARG002 - the run has one column
        climbs, begin = self._climbs(window), int(window.lr.begins[0])
        first, last = (int(index[frame]) - begin for index in (window.lr.begins, window.lr.ends))
        worst = first + int(np.argmax(climbs.factor[first:last]))
        factor, start = float(climbs.factor[worst]), int(climbs.start[worst])
        evidence = {
            "lr": float(climbs.rates[worst]),
            "lr_healthy": f"at most {float(climbs.base[worst]):.3g}, the highest before step {start}",
            "lr_factor": rounded(factor),
            "lr_factor_healthy": below(self.band, self.band.of(PLAIN), in_words),
            "lr_rose_at_step": start,
        }
        message = (
            f"the learning rate rose {in_words(factor)}-fold at step {start}, to {in_words(climbs.rates[worst])}, above "
            "anything used before"
        )
        return Words(evidence, message, ADVICE)

    def state_dict(self) -> dict[str, Any]:
        own = {
            "highest": self._highest, "base": self._base, "start": self._start,
            "risen": self._risen, "ordinal": self._ordinal, "seen": self._seen,
        }  # fmt: skip
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._highest, self._base = float(state["highest"]), float(state["base"])
        self._start, self._risen = int(state["start"]), int(state["risen"])
        self._ordinal, self._seen = int(state["ordinal"]), int(state["seen"])
