"""Values as strict JSON: other languages' readers refuse a file with a NaN in it, whole."""

import json
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np


def plain(value: object) -> Any:  # noqa: ANN401 - any JSON value
    """What JSON can hold of a value: numbers that are not finite become strings that float() reads back.

    Mappings get string keys, sequences and sets become lists, numpy scalars numbers, all else its str().
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | AbstractSet) and not isinstance(value, bytes | bytearray):
        return [plain(item) for item in value]
    return str(value)


def to_json(value: object, *, indent: int | None = None) -> str:
    """`plain(value)` as JSON text."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)
