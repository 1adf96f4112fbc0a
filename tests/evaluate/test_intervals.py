"""Intervals against published values."""

import pytest

from sample_runs.evaluate.intervals import poisson, wilson


def test_wilson_interval_of_nine_in_ten() -> None:
    # Brown, Cai, DasGupta 2001, formula (4), worked by hand for 9 of 10.
    assert wilson(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-4)


def test_wilson_interval_of_nothing_is_everything() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


# Garwood's table of 1936.
@pytest.mark.parametrize(
    ("count", "low", "high"), [(0, 0.0, 3.689), (1, 0.0253, 5.572), (5, 1.623, 11.668), (50, 37.11, 65.92)]
)
def test_exact_poisson_interval(count: int, low: float, high: float) -> None:
    assert poisson(count) == pytest.approx((low, high), abs=6e-3)
