"""The rules of others, as their sources give them."""

import numpy as np
import pytest
from blocks import block_of
from proof_courses import course

from sample_runs.evaluate.baselines import BASELINES
from sample_runs.evaluate.hyperparameters import predictor
from sample_runs.evaluate.rules import cusum, sigmas, zclip


def alternating(count: int) -> np.ndarray:
    return np.where(np.arange(count) % 2 == 0, 1.0, 3.0)


def test_sigmas_are_of_the_128_values_before_and_start_at_the_64th_value() -> None:
    values = alternating(300)
    values[200] = 12.0
    found = sigmas(values)
    assert np.isnan(found[:63]).all()
    assert not np.isnan(found[63:]).any()
    # Mean 2 and sum of squares 128, over 127.
    assert found[200] == pytest.approx(10.0 / np.sqrt(128 / 127))
    assert found[201] < 1.5


def test_a_loss_that_is_not_finite_is_infinitely_far_off_and_counts_for_nothing_after() -> None:
    values = alternating(200)
    values[100] = np.nan
    found = sigmas(values)
    assert np.isinf(found[100])
    assert np.isfinite(found[101:]).all()


def test_a_constant_gives_no_sigmas() -> None:
    assert np.nanmax(sigmas(np.full(200, 2.0))) == 0.0


def test_cusum_adds_up_rises_beyond_its_slack() -> None:
    values = alternating(100)
    values[60:63] = 5.0
    found = cusum(values)
    deviation = np.std(alternating(50), ddof=1)
    assert found[60] == pytest.approx(found[59] + 3.0 / deviation - 0.5)
    assert found[62] > found[61] > found[60]


def test_zclip_takes_in_a_spike_as_it_is_clipped() -> None:
    values = alternating(60)
    values[25] = 22.0
    found = zclip(values)
    assert np.isnan(found[:25]).all()
    mean, deviation = 49 / 25, np.std(values[:25])
    z = (22.0 - mean) / (deviation + 1e-6)
    assert found[25] == pytest.approx(z)
    clipped = mean + 2.5 * deviation * 2.5 / z
    mean = 0.97 * mean + 0.03 * clipped
    variance = 0.97 * deviation**2 + 0.03 * (clipped - mean) ** 2
    assert found[27] == pytest.approx(
        (3.0 - (0.97 * mean + 0.03 * 1.0)) / _next_deviation(mean, variance), rel=1e-6
    )


def _next_deviation(mean: float, variance: float) -> float:
    """After the value 1.0 that follows the spike."""
    mean = 0.97 * mean + 0.03 * 1.0
    return float(np.sqrt(0.97 * variance + 0.03 * (1.0 - mean) ** 2) + 1e-6)


def test_the_predictor_learns_that_high_rates_without_warmup_fail() -> None:
    train = [
        course("crash" if rate > 5e-3 else "healthy", onset=100, about={"lr": rate, "warmup": 20})
        for rate in (1e-3, 2e-3, 3e-3, 1e-2, 2e-2, 3e-2)
    ]
    signal = predictor(train)
    low, high = (course("healthy", about={"lr": rate, "warmup": 20}) for rate in (1e-3, 3e-2))
    assert signal(low).values[0] < 1.0 < signal(high).values[0]
    assert signal(low).steps.tolist() == [0]


def test_every_baseline_alarms_on_what_it_is_for_and_not_on_a_quiet_run() -> None:
    quiet = course(
        "healthy", name="quiet", block=block_of(lambda step: _told(step, broken=False), 500, every=5)
    )
    broken = course(
        "crash", onset=400, name="broken", block=block_of(lambda step: _told(step, broken=True), 500, every=5),
        about={"lr": 2e-2, "warmup": 0},
    )  # fmt: skip
    for baseline in BASELINES:
        if baseline.published is None or "end of warmup" in baseline.name:
            continue
        alarms = baseline.channel([quiet, broken], [quiet, broken]).alarms(
            ["quiet", "broken"], baseline.published
        )
        assert alarms["quiet"] == (), baseline.name
        assert alarms["broken"], baseline.name


def _told(step: int, *, broken: bool) -> dict[str, float]:
    ill = broken and step >= 350
    noise = 0.1 * float(np.sin(step))
    return {
        "loss": 2.0 + noise + (0.1 * (step - 350) if ill else 0.0),
        "grad_norm": 1.0 + noise + (5.0 if ill else 0.0),
        "lr": 5e-2 if ill else 1e-3,
        "max_logit": 500.0 if ill else 10.0,
        "entropy": 0.01 if ill else 2.0,
        "sec_1": 0.999 if ill else 0.5,
    }
