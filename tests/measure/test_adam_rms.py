"""RMS_t against the paper's formula: AdamW run by hand in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diagnostics.measure.adam_rms import SAMPLED, Moment, adam_rms

BETA2, EPS = 0.95, 1e-8


def gradients(shape: tuple[int, ...], steps: int = 5, seed: int = 0) -> list[np.ndarray]:
    """Gradients that grow at the last step, so that the second moment is stale there."""
    rng = np.random.default_rng(seed)
    found = [rng.standard_normal(shape) * 10.0 ** rng.uniform(-4, 0, shape) for _ in range(steps)]
    found[-1] *= 7.0
    return found


def second_moment(found: list[np.ndarray], beta2: float = BETA2) -> np.ndarray:
    """v_t of the AdamW paper: an average that starts at zero."""
    v = np.zeros_like(found[0])
    for g in found:
        v = beta2 * v + (1 - beta2) * g**2
    return v


def by_hand(found: list[np.ndarray], beta2: float = BETA2, eps: float = EPS) -> float:
    corrected = second_moment(found, beta2) / (1 - beta2 ** len(found))
    return math.sqrt(np.mean(found[-1] ** 2 / np.maximum(corrected, eps**2)))


def moment(
    found: list[np.ndarray], step: float | Tensor | None = None, eps: float = EPS, dtype: torch.dtype = torch.float32
) -> Moment:  # fmt: skip
    return Moment(
        torch.tensor(found[-1], dtype=dtype),
        torch.tensor(second_moment(found), dtype=dtype),
        len(found) if step is None else step,
        BETA2,
        eps,
    )


def value(*moments: Moment) -> float:
    found = adam_rms(moments)
    assert found is not None
    assert found.ndim == 0
    return float(found)


@pytest.mark.parametrize("shape", [(1,), (7,), (12, 5), (3, 4, 2, 2)])
@pytest.mark.parametrize("steps", [1, 2, 40])
def test_it_is_the_papers_formula_of_the_corrected_moment(shape: tuple[int, ...], steps: int) -> None:
    found = gradients(shape, steps)
    assert value(moment(found)) == pytest.approx(by_hand(found), rel=1e-5)
    assert value(moment(found, dtype=torch.float64)) == pytest.approx(by_hand(found), rel=1e-12)


def test_at_the_first_step_it_is_one_whatever_the_gradient() -> None:
    assert value(moment([np.array([3.0, -1e-3, 40.0])])) == pytest.approx(1.0, rel=1e-6)


def test_a_step_that_only_the_device_knows_gives_the_same() -> None:
    found = gradients((6, 3), steps=3)
    assert value(moment(found, torch.tensor(3.0))) == pytest.approx(by_hand(found), rel=1e-5)
    assert value(moment(found, torch.tensor(3))) == pytest.approx(by_hand(found), rel=1e-5)


def test_the_largest_of_the_tensors_counts_whatever_their_kind() -> None:
    calm, stale = gradients((9, 4), seed=1), gradients((5,), seed=2)
    stale[-1] *= 50.0
    expected = max(by_hand(calm), by_hand(stale))
    assert expected == by_hand(stale)
    for order in ([calm, stale], [stale, calm]):
        assert value(*map(moment, order)) == pytest.approx(expected, rel=1e-5)
    mixed = [moment(calm, dtype=torch.float64), moment(stale, torch.tensor(5.0))]
    assert value(*mixed) == pytest.approx(expected, rel=1e-5)


def test_more_tensors_than_are_worked_on_at_once_all_count() -> None:
    found = [gradients((2,), seed=seed) for seed in range(600)]
    assert value(*map(moment, found)) == pytest.approx(max(map(by_hand, found)), rel=1e-5)


def test_eps_bounds_what_is_divided_by_and_nothing_over_nothing_is_nothing() -> None:
    found = [np.array([0.0, 0.0]), np.array([1e-9, 0.0])]
    assert value(moment(found)) == pytest.approx(by_hand(found), rel=1e-5)
    # Without eps: rows of an embedding that were never met have neither gradient nor moment.
    assert value(moment([np.array([0.0, 2.0])], eps=0.0)) == pytest.approx(math.sqrt(0.5), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_before_it_is_squared(dtype: torch.dtype) -> None:
    found = [np.full((4, 4), 2.0**-3), np.full((4, 4), 2.0**9)]
    expected = by_hand([each.astype(np.float64) for each in found])
    exact = moment(found, dtype=torch.float64)
    given = Moment(exact.gradient.to(dtype), exact.second_moment.float(), 2, BETA2, EPS)
    assert value(given) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_no_number_shows(bad: float) -> None:
    found = gradients((3, 3))
    given = moment(found)
    given.gradient[1, 1] = bad
    assert not math.isfinite(value(moment(gradients((8,))), given))


def test_of_a_large_tensor_an_even_spread_of_entries_counts_and_no_columns_are_favoured() -> None:
    rows, columns = (
        1024,
        512,
    )  # 8 times as many as are read; a stride of 8 would see every eighth column alone
    rng = np.random.default_rng(0)
    # Every eighth column is 20 times as stale as the others.
    ratio = np.where(np.arange(columns) % 8 == 0, 2.0, 0.1) * np.ones((rows, 1))
    gradient = rng.standard_normal((rows, columns))
    given = Moment(torch.tensor(gradient), torch.tensor((gradient / ratio) ** 2), math.inf, BETA2, EPS)
    assert rows * columns > 4 * SAMPLED
    assert value(given) == pytest.approx(math.sqrt(np.mean(ratio**2)), rel=2e-2)


@pytest.mark.parametrize("both", [True, False])
def test_the_memory_order_of_gradient_and_moment_does_not_matter(both: bool) -> None:  # noqa: FBT001 - a parameter
    found = gradients((6, 5, 3, 2))
    plain = moment(found)
    turned = plain.second_moment.to(memory_format=torch.channels_last) if both else plain.second_moment
    given = Moment(plain.gradient.to(memory_format=torch.channels_last), turned, plain.step, BETA2, EPS)
    assert value(given) == pytest.approx(by_hand(found), rel=1e-5)
    other = Moment(plain.gradient, given.gradient.square(), math.inf, BETA2, EPS)
    assert value(other) == pytest.approx(1.0, rel=1e-5)


def test_nothing_to_measure_is_none() -> None:
    assert adam_rms([]) is None
    assert adam_rms([Moment(torch.zeros(0, 3), torch.zeros(0, 3), 1, BETA2, EPS)]) is None


def test_what_is_given_stays_as_it_was() -> None:
    given = [moment(gradients((4, 3)), torch.tensor(5.0)), moment(gradients((4,)))]
    before = [(each.gradient.clone(), each.second_moment.clone()) for each in given]
    state = torch.get_rng_state()
    value(*given)
    assert all(
        torch.equal(each.gradient, g) and torch.equal(each.second_moment, v)
        for each, (g, v) in zip(given, before, strict=True)
    )
    assert float(given[0].step) == 5.0
    assert torch.equal(torch.get_rng_state(), state)
