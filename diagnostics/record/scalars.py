"""How a step's scalars are handed over: as numbers, without waiting for a device and without holding a graph alive.

A tensor on a device is copied there and fetched later, on the writer's thread; until then `PENDING` stands for it.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor

from diagnostics.store.format import TABLES
from diagnostics.store.tail.frames import NULL, PENDING

# Columns of the table that the recorder fills, and those that name the writer in the parts of later attempts.
_OWN_COLUMNS = (frozenset(column.name for column in TABLES["steps"]) - {"loss", "lr", "grad_norm"}) | {
    "attempt",
    "rank",
}
_LARGEST_INT = 2**1000

Note = Callable[[str], None]


class Late(NamedTuple):
    """A scalar on a device, to be fetched."""

    step: int
    name: str
    value: Tensor


class Scalars:
    """Turns what `recorder.step` was given into numbers, and keeps what is on a device for later.

    Args:
        note: tells the user something once.
    """

    def __init__(self, note: Note) -> None:
        self._note = note
        self._late: deque[Late] = deque()

    def kept(self, step: int, name: str, value: object) -> float:
        """A scalar as it goes on record: a number, `NULL` where it is none, `PENDING` where it lies on a device.

        Args:
            step: the step it is of.
            name: as the user gave it, for the message.
            value: float, int, 0-d tensor or array; what else it is is noted once and not recorded.
        """
        if isinstance(value, float):
            return value
        if value is None:
            return NULL
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            if value.device.type == "cpu":
                return float(value.item())
            self._late.append(Late(step, name, value.detach().clone()))
            return PENDING
        of_numpy = (
            isinstance(value, np.generic | np.ndarray) and value.size == 1 and value.dtype.kind in "biuf"
        )
        if of_numpy or (isinstance(value, int) and abs(value) <= _LARGEST_INT):
            return float(value.item() if of_numpy else value)  # type: ignore[attr-defined, arg-type]
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
        self._note(
            f"recorder.step: {name} is a {type(value).__name__}{shape}; give a float or a 0-d tensor. It is not recorded"
        )
        return NULL

    def allowed(self, scalars: Mapping[str, object]) -> Mapping[str, object]:
        """Without those whose names are columns that the recorder fills itself, each of which is noted once."""
        if _OWN_COLUMNS.isdisjoint(scalars):
            return scalars
        for name in _OWN_COLUMNS.intersection(scalars):
            self._note(
                f"recorder.step: {name!r} is a column that the recorder fills itself; hand the scalar in under "
                "another name. It is not recorded"
            )
        return {name: value for name, value in scalars.items() if name not in _OWN_COLUMNS}

    def fetched(self, up_to: int) -> dict[int, dict[str, float]]:
        """The scalars on devices of the steps up to one, fetched; by step, then by name. Waits for the device."""
        found: dict[int, dict[str, float]] = {}
        while self._late and self._late[0].step <= up_to:
            late = self._late.popleft()
            found.setdefault(late.step, {})[late.name] = float(late.value.item())
        return found
