"""A run's course in six numbers a step, for `watch` and for the demonstration's table."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import pyarrow as pa

from diagnostics.store.read import Run

Series = dict[int, float | None]
Over = Literal["min", "max", "mean"]

# One step's loss is one batch's; over this many the batches differ little.
_LOSS_STEPS = 20


@dataclass(frozen=True)
class Drawn:
    """One series: the attribute of `Progress`, its name for people, where it is from, how a step's rows are one."""

    name: str
    label: str
    table: str
    column: str
    over: Over


DRAWN = (
    Drawn("loss", "loss", "steps", "loss", "max"),
    Drawn("entropy", "lowest entropy (nats)", "attention", "entropy", "min"),
    Drawn("sec", "mean SEC", "spectra", "sec_1", "mean"),
    Drawn("logit", "largest logit", "attention", "max_logit", "max"),
    Drawn("ratio", "largest update ratio", "updates", "ratio", "max"),
    Drawn("grad_norm", "gradient norm", "steps", "grad_norm", "max"),
)


@dataclass
class Progress:
    """What is known of a run so far, by step; None where the tables hold null.

    Attributes:
        loss: as handed to the recorder.
        entropy: lowest attention entropy over layers and heads, nats.
        sec: share of the spectral energy in the largest singular value, mean over layers and heads.
        logit: largest scaled logit over layers and heads.
        ratio: largest sigma1 of an update over sigma1 of its weight, over the matrices.
        grad_norm: as measured, or as handed to the recorder.
    """

    loss: Series = field(default_factory=dict)
    entropy: Series = field(default_factory=dict)
    sec: Series = field(default_factory=dict)
    logit: Series = field(default_factory=dict)
    ratio: Series = field(default_factory=dict)
    grad_norm: Series = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """The last step known."""
        return next(reversed(self.loss), None)

    def series(self, table: str | None = None) -> Iterator[tuple[Drawn, Series]]:
        """The series that come from a table; None: all, in the order they are shown."""
        return ((drawn, getattr(self, drawn.name)) for drawn in DRAWN if table in (None, drawn.table))

    def read(self, run: Run, start_step: int = 0) -> None:
        """Takes in what the run has written since the last call; the first call begins at `start_step`."""
        for drawn, series in self.series():
            start = max(start_step, next(reversed(series), start_step - 1) + 1)
            rows = run.table(drawn.table, ["step", drawn.column], start)
            series.update(by_step(rows, drawn.column, drawn.over))

    def take_in(self, table: str, rows: pa.Table) -> None:
        """Takes in rows of a table."""
        for drawn, series in self.series(table):
            series.update(by_step(rows, drawn.column, drawn.over))

    def forget_from(self, table: str, first_step: int) -> None:
        """Drops the steps that a new attempt computes again."""
        for _, series in self.series(table):
            for step in [step for step in series if step >= first_step]:
                del series[step]

    def forget_before(self, first_step: int) -> None:
        """Drops steps that nobody looks at any more."""
        for drawn, series in self.series():
            setattr(self, drawn.name, {step: value for step, value in series.items() if step >= first_step})

    def final_loss(self) -> float | None:
        """Mean loss of the last 20 steps that have one; NaN if one of them is; None without any."""
        losses = [loss for loss in self.loss.values() if loss is not None][-_LOSS_STEPS:]
        return math.fsum(losses) / len(losses) if losses else None


def last(series: Series) -> float | None:
    """The newest value that was measured."""
    return next((value for value in reversed(series.values()) if value is not None), None)


def by_step(rows: pa.Table, column: str, over: Over) -> Series:
    """A column's value at each step, over that step's rows."""
    # Arrow rather than pandas: it keeps null (not measured) apart from NaN (measured, and not a number).
    each = rows.group_by("step", use_threads=False).aggregate([(column, over)])
    return dict(zip(each["step"].to_pylist(), each[f"{column}_{over}"].to_pylist(), strict=True))
