"""What is kept is what was worked out of the very same things, and no more of it than fits."""

import pandas as pd
import pytest

from diagnostics.app import keeping
from diagnostics.app.keeping import Keeper, Same


def test_a_value_is_worked_out_once_per_stamp() -> None:
    keeper, made = Keeper(8), []

    def make() -> int:
        made.append(1)
        return len(made)

    assert [keeper.get("a", 1, make), keeper.get("a", 1, make), keeper.get("a", 2, make)] == [1, 1, 2]
    assert len(keeper) == 1


def test_what_was_asked_for_longest_ago_goes_first() -> None:
    keeper = Keeper(2)
    for key in ("a", "b", "a", "c"):
        keeper.get(key, 0, lambda: 0)
    assert ("a" in keeper, "b" in keeper, "c" in keeper) == (True, False, True)


def test_frames_are_kept_within_a_bound_of_bytes_and_the_newest_always(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeping, "MOST_BYTES", 2000)
    keeper = Keeper(8)
    for key in ("a", "b", "c"):
        keeper.get(key, 0, lambda: pd.DataFrame({"x": range(100)}))  # 800 bytes of int64 each, and an index
    assert ("a" in keeper, "b" in keeper, "c" in keeper) == (False, True, True)
    keeper.get("large", 0, lambda: pd.DataFrame({"x": range(10_000)}))
    assert ("b" in keeper, "c" in keeper, "large" in keeper) == (False, False, True)


def test_a_stamp_of_objects_tells_equal_ones_apart() -> None:
    one, other = [1], [1]
    assert Same((one,)) == Same((one,))
    assert Same((one,)) != Same((other,))
    assert Same((one,)) != (one,)
