"""A run's course in four numbers a step, for `watch` and for the demonstration's table."""

import math
from dataclasses import dataclass, field
from typing import Literal

from diagnostics.store.read import Run

Series = dict[int, float | None]

# One step's loss is one batch's; over this many the batches differ little.
_LOSS_STEPS = 20


@dataclass
class Progress:
    """What is known of a run so far, by step; None where the tables hold null.

    Attributes:
        loss: as handed to the recorder.
        entropy: lowest attention entropy over layers and heads, nats.
        sec: share of the spectral energy in the largest singular value, mean over layers and heads.
        logit: largest scaled logit over layers and heads.
    """

    loss: Series = field(default_factory=dict)
    entropy: Series = field(default_factory=dict)
    sec: Series = field(default_factory=dict)
    logit: Series = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """The last step known."""
        return next(reversed(self.loss), None)

    def read(self, run: Run, start_step: int = 0) -> None:
        """Takes in what the run has written since the last call; the first call begins at `start_step`."""
        _extend(self.loss, run, "steps", "loss", "max", start_step)
        _extend(self.entropy, run, "attention", "entropy", "min", start_step)
        _extend(self.logit, run, "attention", "max_logit", "max", start_step)
        _extend(self.sec, run, "spectra", "sec_1", "mean", start_step)

    def final_loss(self) -> float | None:
        """Mean loss of the last 20 steps that have one; NaN if one of them is; None without any."""
        losses = [loss for loss in self.loss.values() if loss is not None][-_LOSS_STEPS:]
        return math.fsum(losses) / len(losses) if losses else None


def last(series: Series) -> float | None:
    """The newest value that was measured."""
    return next((value for value in reversed(series.values()) if value is not None), None)


def _extend(
    series: Series, run: Run, table: str, column: str, over: Literal["min", "max", "mean"], start_step: int
) -> None:
    start_step = max(start_step, next(reversed(series), start_step - 1) + 1)
    # Arrow rather than pandas: it keeps null (not measured) apart from NaN (measured, and not a number).
    rows = (
        run.table(table, ["step", column], start_step)
        .group_by("step", use_threads=False)
        .aggregate([(column, over)])
    )
    series.update(zip(rows["step"].to_pylist(), rows[f"{column}_{over}"].to_pylist(), strict=True))
