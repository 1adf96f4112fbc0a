"""What a detector is fed: one frame per measured step, the same whether live or read back from the tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

HEAD_COLUMNS = {
    "attention": ("entropy", "entropy_min", "entropy_frac", "entropy_bound", "max_logit", "rank_frac"),
    "spectra": ("sigma1", "sec_1", "sec_4", "sec_10", "stable_rank", "effective_rank"),
}
UPDATE_COLUMNS = ("sigma1", "update_sigma1", "ratio", "scale")


@dataclass(frozen=True)
class Rows:
    """Rows of one table at one step: `keys` names them, `values` holds a column each, NaN for null."""

    keys: tuple[tuple[str, int], ...] | tuple[str, ...] = ()
    values: Mapping[str, Values] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.keys)

    def column(self, name: str) -> Values:
        """The column, NaN in every row where the table has none."""
        present = self.values.get(name)
        return np.full(len(self.keys), np.nan) if present is None else present


@dataclass(frozen=True)
class Frame:
    """All that is known between the previous frame and `step`, inclusive.

    Attributes:
        step: the measured step that closes the frame, or the run's last step.
        steps: every step since the previous frame, ascending, `step` last.
        losses: the loss of each of `steps`, NaN where it was not handed in.
        loss_given: whether a loss was handed in at each of `steps` (a NaN loss is a loss).
        attention, spectra: rows by (layer, head); updates: rows by parameter; empty where not measured.
    """

    step: int
    steps: NDArray[np.int64]
    losses: Values
    loss_given: NDArray[np.bool_]
    attention: Rows = field(default_factory=Rows)
    spectra: Rows = field(default_factory=Rows)
    updates: Rows = field(default_factory=Rows)
