"""How a step's scalars are handed over: kept without waiting for a device and without holding a graph alive."""

from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor

from diagnostics.store.format import TABLES

_OWN_COLUMNS = frozenset(column.name for column in TABLES["steps"]) - {"loss", "lr", "grad_norm"}
_LARGEST_INT = 2**1000

Note = Callable[[str], None]


def kept_scalar(name: str, value: object, note: Note) -> object:
    """A scalar as it can be kept: a number, a copy of a tensor on a device, or None where it is neither.

    Args:
        name: as the user gave it, for the message.
        value: float, int, 0-d tensor or array; what else it is is noted once and not recorded.
        note: tells the user something once.
    """
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return value.item() if value.device.type == "cpu" else value.detach().clone()
    if isinstance(value, np.generic | np.ndarray) and value.size == 1 and value.dtype.kind in "biuf":
        return float(value.item())
    if isinstance(value, int) and abs(value) <= _LARGEST_INT:
        return float(value)
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
    note(
        f"recorder.step: {name} is a {type(value).__name__}{shape}; give a float or a 0-d tensor. It is not recorded"
    )
    return None


def kept_scalars(scalars: Mapping[str, object], note: Note) -> dict[str, object]:
    """The user's own scalars; a name that the recorder fills itself is noted once and not recorded."""
    taken = [name for name in scalars if name in _OWN_COLUMNS]
    for name in taken:
        note(
            f"recorder.step: {name!r} is a column that the recorder fills itself; hand the scalar in under another "
            "name. It is not recorded"
        )
    return {name: kept_scalar(name, value, note) for name, value in scalars.items() if name not in taken}
