"""What the detectors are fed: a block of frames, the same arrays whether live or read back from the tables."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Key = tuple[str, int]

ATTENTION = ("entropy", "entropy_frac", "entropy_bound", "max_logit", "rank_frac")
SPECTRA = ("sigma1", "sec_1", "stable_rank", "effective_rank")
UPDATES = ("ratio", "scale")
SCALARS = ("lr", "grad_norm", "adam_rms")


@dataclass(frozen=True)
class Block:
    """Consecutive frames of one run: a frame is a measured step with all steps since the one before.

    F frames, H heads, P parameters, S steps. What was not measured is NaN.

    Attributes:
        steps: (F,) the measured step that closes each frame; the run's last step closes an unmeasured last one.
        every_step: (S,) all steps of these frames, ascending.
        ends: (F,) index into `every_step` just behind each frame's last step.
        losses: (S,) the loss of each step; loss_given: whether one was handed in (a NaN loss is a loss).
        scalars: (S,) each of `SCALARS`.
        heads: (layer, head), sorted; attention, spectra: (F, H) each of the columns named above.
        parameters: names, sorted; updates: (F, P).
        measured: (F,) whether the step that closes the frame was measured; None: all were.
    """

    steps: Ints
    every_step: Ints
    ends: Ints
    losses: Values
    loss_given: Bools
    scalars: Mapping[str, Values] = field(default_factory=dict)
    heads: tuple[Key, ...] = ()
    attention: Mapping[str, Values] = field(default_factory=dict)
    spectra: Mapping[str, Values] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    updates: Mapping[str, Values] = field(default_factory=dict)
    measured: Bools | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def head_column(self, name: str) -> Values:
        """(F, H) of a column of either table; all NaN where it was not recorded."""
        found = self.attention.get(name, self.spectra.get(name))
        return np.full((len(self), len(self.heads)), np.nan) if found is None else found

    def update_column(self, name: str) -> Values:
        found = self.updates.get(name)
        return np.full((len(self), len(self.parameters)), np.nan) if found is None else found

    def scalar(self, name: str) -> Values:
        found = self.scalars.get(name)
        return np.full(len(self.every_step), np.nan) if found is None else found

    def part(self, first: int, last: int) -> "Block":
        """The frames from `first` to before `last`."""
        begin = int(self.ends[first - 1]) if first else 0
        end = int(self.ends[last - 1]) if last else 0
        return Block(
            steps=self.steps[first:last],
            measured=None if self.measured is None else self.measured[first:last],
            every_step=self.every_step[begin:end],
            ends=self.ends[first:last] - begin,
            losses=self.losses[begin:end],
            loss_given=self.loss_given[begin:end],
            scalars={name: values[begin:end] for name, values in self.scalars.items()},
            heads=self.heads,
            attention={name: values[first:last] for name, values in self.attention.items()},
            spectra={name: values[first:last] for name, values in self.spectra.items()},
            parameters=self.parameters,
            updates={name: values[first:last] for name, values in self.updates.items()},
        )
