import json
from pathlib import Path

import numpy as np
import pytest

from diagnostics.store.plain import plain, to_json


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (float("inf"), "inf"),
        (float("nan"), "nan"),
        (np.float32(0.5), 0.5),
        (np.int64(3), 3),
        (np.float64("-inf"), "-inf"),
        ({1: (2, None), "a": {3.0}}, {"1": [2, None], "a": [3.0]}),
        (Path("x/y"), "x/y"),
        (b"raw", "b'raw'"),
        (True, True),
    ],
)
def test_every_value_becomes_strict_json(value: object, expected: object) -> None:
    assert plain(value) == expected
    text = to_json({"value": value})
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) == {
        "value": expected
    }


def test_an_infinity_comes_back_as_a_number_through_float() -> None:
    assert float(json.loads(to_json([float("inf")]))[0]) == float("inf")
