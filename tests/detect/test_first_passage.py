import math

import numpy as np
import pytest
from scipy.stats import invgauss, theilslopes

from diagnostics.detect.first_passage import first_passage_cdf, first_passage_quantile, hit_probability
from diagnostics.detect.theil_sen import noise, theil_sen

CASES = [(1.0, 0.01, 0.02), (2.3, 0.05, 0.2), (0.1, 0.001, 0.05), (5.0, 0.05, 0.001), (3.0, 0.0002, 0.3)]


@pytest.mark.parametrize(("distance", "drift", "sigma"), CASES)
@pytest.mark.parametrize("level", [0.01, 0.1, 0.5, 0.9, 0.99])
def test_quantiles_are_those_of_the_inverse_gaussian(
    distance: float, drift: float, sigma: float, level: float
) -> None:
    mean, shape = distance / drift, distance**2 / sigma**2
    expected = invgauss.ppf(level, mean / shape, scale=shape)
    assert first_passage_quantile(level, distance, drift, sigma) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("distance", "drift", "sigma"), CASES)
def test_cdf_is_that_of_the_inverse_gaussian_over_its_whole_range(
    distance: float, drift: float, sigma: float
) -> None:
    mean, shape = distance / drift, distance**2 / sigma**2
    for time in np.geomspace(mean / 50, mean * 20, 40):
        expected = invgauss.cdf(time, mean / shape, scale=shape)
        assert first_passage_cdf(time, distance, drift, sigma) == pytest.approx(expected, rel=1e-7, abs=1e-12)


def test_simulated_walks_arrive_when_the_law_says() -> None:
    rng = np.random.default_rng(5)
    distance, drift, sigma, fine = 1.0, 0.02, 0.08, 0.05
    steps = rng.normal(drift * fine, sigma * math.sqrt(fine), size=(2000, 6000)).cumsum(axis=1)
    reached = steps >= distance
    arrival = np.where(reached.any(axis=1), (reached.argmax(axis=1) + 1) * fine, np.inf)
    for level in (0.1, 0.5, 0.9):
        quantile = first_passage_quantile(level, distance, drift, sigma)
        # Three standard errors of a share of 2000, and what a walk looked at every twentieth of a step passes unseen.
        assert np.mean(arrival <= quantile) == pytest.approx(level, abs=0.04)


def test_a_walk_that_drifts_away_arrives_with_the_known_probability() -> None:
    distance, drift, sigma = 1.0, -0.02, 0.2
    ever = math.exp(2 * drift * distance / sigma**2)
    assert hit_probability(distance, drift, sigma) == pytest.approx(ever)
    assert first_passage_cdf(1e7, distance, drift, sigma) == pytest.approx(ever, rel=1e-6)
    assert first_passage_quantile(0.5, distance, drift, sigma) == math.inf
    within = first_passage_quantile(0.2, distance, drift, sigma)
    assert first_passage_cdf(within, distance, drift, sigma) == pytest.approx(0.2, rel=1e-9)


def test_a_walk_without_drift_follows_the_levy_law() -> None:
    # P(T <= t) = 2 Phi(-d / (sigma sqrt(t))): the reflection principle.
    expected = math.erfc(1.5 / (0.3 * math.sqrt(40.0)) / math.sqrt(2))
    assert first_passage_cdf(40.0, 1.5, 0.0, 0.3) == pytest.approx(expected, rel=1e-12)


def test_more_drift_never_arrives_later() -> None:
    medians = [first_passage_quantile(0.5, 1.0, drift, 0.1) for drift in np.geomspace(1e-4, 1.0, 25)]
    assert medians == sorted(medians, reverse=True)


def test_slopes_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    steps = np.cumsum(rng.integers(1, 9, size=11))
    values = rng.normal(size=(11, 7)).cumsum(axis=0)
    expected = [theilslopes(values[:, column], steps)[0] for column in range(7)]
    assert theil_sen(steps, values) == pytest.approx(expected, rel=1e-12)


def test_points_that_were_not_measured_are_as_if_never_there() -> None:
    rng = np.random.default_rng(1)
    steps = np.arange(0, 55, 5)
    values = rng.normal(size=(11, 3)).cumsum(axis=0)
    values[[2, 5, 6], 1] = np.nan
    values[1:, 2] = np.nan
    seen = ~np.isnan(values[:, 1])
    slopes = theil_sen(steps, values)
    assert slopes[1] == pytest.approx(theilslopes(values[seen, 1], steps[seen])[0], rel=1e-12)
    assert np.isnan(slopes[2])
    assert np.isnan(theil_sen(steps[:1], values[:1])).all()


def test_one_wild_point_does_not_move_the_slope() -> None:
    steps = np.arange(0, 55, 5)
    values = 0.04 * steps.astype(np.float64)[:, None]
    values[4] += 100.0
    assert theil_sen(steps, values)[0] == pytest.approx(0.04, abs=1e-12)


def test_noise_is_per_square_root_of_a_step_whatever_the_gaps() -> None:
    rng = np.random.default_rng(2)
    steps = np.cumsum(rng.choice([1, 5, 20], size=4001))
    gaps = np.diff(steps)
    increments = 0.03 * gaps[:, None] + 0.2 * np.sqrt(gaps)[:, None] * rng.normal(size=(4000, 2))
    values = np.concatenate([np.zeros((1, 2)), increments.cumsum(axis=0)])
    assert noise(steps, values, np.array([0.03, 0.03])) == pytest.approx([0.2, 0.2], rel=0.05)
