"""A loss that does not move: for long (reported), or ever since the beginning (alarmed).

A flat loss alone may be a finished training, so it is told and no more. Where attention shows why it is flat, rank
collapse says so (`rank_collapse.py`). A loss that stopped near where it began has no such excuse: on public training
logs (`sample_runs/evaluate/real_logs.py`) the second rule names 8 of the 9 runs that never learned and 5 of 356
healthy ones, which stood still for hundreds of points before they did.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect.bands import Band
from diagnostics.detect.block import Bools, Ints, Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import Finding, in_words, rounded
from diagnostics.detect.window import Window

IMPROVEMENT = 0.02
"""Share of the loss by which its median must fall to count as progress."""
LEAST_STEPS = 200
PATIENCE = 3
"""A run is given this many times as long as its last progress took to show the next."""
LEARNED_SHARE = 0.15
"""Fallen by this share of where it began, the loss has learned something. A model at the loss of token frequencies
has fallen by some 30 %, and so has many a fine-tune that is well: the loss alone cannot tell them apart."""
STALL_STEPS = 500
TINY = 1e-12
STALL_ADVICE = (
    "nothing to do if this is the loss you train for; else the learning rate may have run out (see its schedule), or the "
    "model learns nothing more: look for rank collapse and dead heads among the findings"
)
NEVER_ADVICE = (
    "restart with a warmup, a lower learning rate or the spectral bound armed from the start, and check that inputs and labels "
    "belong together; a run that sits here for hundreds of steps seldom gets away by itself"
)


class _Progress(Detector):
    """Remembers the last progress of the loss: the step at which its median was 2 % below what it was at the one before."""

    over = "run"
    calm = 1
    refractory = 0

    def __init__(self, band: Band) -> None:
        super().__init__(band)
        self._level, self._step = np.inf, -1

    def feed(self, window: Window) -> list[Finding]:
        levels, steps = self.progress(window)
        raised = super().feed(window)
        if len(levels):
            self._level, self._step = float(levels[-1]), int(steps[-1])
        return raised

    def progress(self, window: Window) -> tuple[Values, Ints]:
        """(F,) each: the median at the last progress and its step, as they stand at each frame; inf and -1 before any."""
        median = np.where(np.isnan(window.loss.median), np.inf, window.loss.median)
        levels, steps = np.full(len(window), self._level), np.full(len(window), self._step)
        frame, level = 0, self._level
        while frame < len(window):
            # From progress to progress: at 2 % each there are few, however long the run.
            wanted = level - IMPROVEMENT * abs(level) if np.isfinite(level) else np.inf
            better: Bools = median[frame:] < wanted
            if not better.any():
                break
            frame += int(np.argmax(better))
            level = float(median[frame])
            levels[frame:], steps[frame:] = level, window.steps[frame]
            frame += 1
        return levels, steps

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"level": self._level, "step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._level, self._step = float(state["level"]), int(state["step"])


class LossStall(_Progress):
    """Info; no change of status: 500 steps without progress of a loss that came down before."""

    kind = "loss-stall"
    severity = "info"
    status = "healthy"
    needed = 3

    def signal(self, window: Window) -> Values:
        """Steps without progress, in units of 500; 0 where the loss has risen instead, which is no stall."""
        levels, since = self.progress(window)
        with np.errstate(invalid="ignore"):
            flat = np.abs(window.loss.median - levels) < 2 * IMPROVEMENT * np.abs(levels)
        stalled = np.where(flat, (window.steps - since) / STALL_STEPS, 0.0)
        return np.where(np.isnan(window.loss.median), np.nan, stalled)[:, None]

    def describe(self, window: Window, frame: int, column: int) -> Words:
        del column
        since = int(self.progress(window)[1][frame])
        median = float(window.loss.median[frame])
        evidence = {
            "loss_median": rounded(median),
            "last_progress_step": since,
            "steps_without_progress": int(window.steps[frame]) - since,
        }
        message = (
            f"the loss has stayed at {in_words(median)} since step {since}: a training that is done, or one that learns "
            "nothing more"
        )
        return Words(evidence, message, STALL_ADVICE)


class NeverLearned(_Progress):
    """Warning; status at risk until the loss falls again."""

    kind = "never-learned"
    needed = 3

    def signal(self, window: Window) -> Values:
        """Steps without progress over three times those that the last progress took, or over 200; 0 where it has learned."""
        _, since = self.progress(window)
        waited = (window.steps - since) / np.maximum(PATIENCE * (since - window.first_step), LEAST_STEPS)
        return np.where(np.isnan(window.loss.first), np.nan, np.where(self._learned(window), 0.0, waited))[
            :, None
        ]

    def _learned(self, window: Window) -> Bools:
        fallen = (window.loss.first - window.loss.best) / np.maximum(np.abs(window.loss.first), TINY)
        return np.asarray(~(fallen < LEARNED_SHARE))

    def describe(self, window: Window, frame: int, column: int) -> Words:
        del column
        since = int(self.progress(window)[1][frame])
        first, best = float(window.loss.first[frame]), float(window.loss.best[frame])
        evidence = {
            "loss_first": rounded(first),
            "best_loss_median": rounded(best),
            "fallen_share": rounded((first - best) / max(abs(first), TINY)),
            "fallen_share_healthy": [LEARNED_SHARE, 1.0],
            "last_progress_step": since,
        }
        message = f"the loss began at {in_words(first)} and never came below {in_words(best)}: no progress since step {since}"
        return Words(evidence, message, NEVER_ADVICE)
