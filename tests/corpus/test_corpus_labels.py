"""The label rule, on curves drawn by hand."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from sample_runs.corpus.labels import (
    Label,
    Reference,
    final_loss,
    label_of,
    margin,
    reference_of,
    scatter,
    smooth,
)

CHANCE = 3.2
LEARNED = 1.2
STEPS = 400
Curve = NDArray[np.float64]


def curve(*points: tuple[int, float], steps: int = STEPS) -> Curve:
    """Straight lines through (step, loss)."""
    at, losses = zip(*points, strict=True)
    return np.asarray(np.interp(np.arange(steps), at, losses), dtype=np.float64)


SOUND = curve((0, 4.8), (100, 1.2), (400, 1.2))
REFERENCE = Reference(final=LEARNED, half_step=78)


def judged(losses: Curve, chance: float = CHANCE, reference: Reference = REFERENCE) -> Label:
    return label_of(losses, chance=chance, reference=reference)


def test_the_reference_is_the_lowest_ending_and_the_step_where_half_of_it_was_learned() -> None:
    worse = curve((0, 4.8), (50, 1.0), (400, 2.5))
    # Half of chance - 1.2 is had at 2.2, which the line passes at step 72.2; the median of 11 steps lags by 5.
    assert reference_of([worse, SOUND], CHANCE) == REFERENCE


def test_runs_that_learned_next_to_nothing_are_no_reference() -> None:
    assert reference_of([np.full(STEPS, 3.1)], CHANCE) is None
    assert reference_of([], CHANCE) is None


def test_a_curve_that_falls_and_stays_down_is_healthy() -> None:
    assert judged(SOUND) == Label("healthy", None, None, LEARNED, 1.0)


def test_noise_of_single_steps_is_healthy() -> None:
    noisy = SOUND + np.random.default_rng(0).normal(0, 0.15, STEPS)
    noisy[200] = 9.0
    noisy[300:304] = 6.0
    assert judged(noisy).label == "healthy"


def test_a_rise_that_lasts_is_a_crash_dated_at_its_first_loss_above_the_level() -> None:
    losses = SOUND.copy()
    losses[250:] = 3.0
    # The margin is 0.3: a quarter of 1.2, and less than half of what was learned.
    assert margin(LEARNED, CHANCE, 0.0) == pytest.approx(0.3)
    found = judged(losses)
    assert (found.label, found.onset_step, found.recovered_step) == ("crash", 250, None)


def test_a_slow_rise_is_dated_where_it_passes_the_level() -> None:
    found = judged(curve((0, 4.8), (100, 1.2), (200, 1.2), (400, 3.2)))
    # 1.5 is passed 30 steps after 200.
    assert found.label == "crash"
    assert found.onset_step == 231


def test_a_rise_shorter_than_the_median_is_no_crash_however_high() -> None:
    losses = SOUND.copy()
    losses[250:255] = 100.0
    assert judged(losses).label == "healthy"


def test_a_spike_that_comes_down_is_recovered_and_says_from_when_on() -> None:
    losses = SOUND.copy()
    losses[250:290] = 3.0
    found = judged(losses)
    # 40 of the 150 steps from the onset on, less than 0.4; the median of 11 is down when 6 losses are.
    assert (found.label, found.onset_step, found.recovered_step) == ("spike-recovered", 250, 295)


def test_a_spike_that_costs_much_of_what_remains_is_a_crash() -> None:
    losses = SOUND.copy()
    losses[250:320] = 3.0
    assert judged(losses).label == "crash"


def test_the_crash_is_dated_by_itself_and_not_by_a_spike_before_it() -> None:
    losses = SOUND.copy()
    losses[150:170] = 3.0
    losses[300:] = 3.0
    assert judged(losses).onset_step == 300


def test_of_two_spikes_the_first_is_the_onset_and_the_last_the_recovery() -> None:
    losses = SOUND.copy()
    losses[150:170] = 3.0
    losses[300:320] = 3.0
    found = judged(losses)
    assert (found.label, found.onset_step, found.recovered_step) == ("spike-recovered", 150, 325)


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_losses_that_are_not_finite_to_the_end_are_a_crash_at_the_first(lost: float) -> None:
    losses = SOUND[:270].copy()
    losses[250:] = lost
    found = judged(losses)
    assert (found.label, found.onset_step) == ("crash", 250)
    assert math.isinf(found.final_loss)


def test_a_run_that_is_lost_from_the_first_step_on_is_a_crash_at_step_0() -> None:
    found = judged(np.full(20, math.nan))
    assert (found.label, found.onset_step) == ("crash", 0)


def test_a_single_loss_that_is_not_finite_is_forgiven() -> None:
    losses = SOUND.copy()
    losses[250] = math.nan
    assert judged(losses).label == "healthy"


def test_a_curve_that_stays_at_chance_never_learned_since_the_reference_had_half() -> None:
    found = judged(curve((0, 4.8), (50, 3.2), (400, 3.2)))
    assert (found.label, found.onset_step) == ("never-learned", 78)


def test_what_was_not_learned_in_time_is_not_lost_later() -> None:
    losses = curve((0, 4.8), (50, 3.2), (300, 2.6), (350, 2.6), (351, 9.0), (400, 9.0))
    found = judged(losses)
    assert (found.label, found.onset_step) == ("never-learned", 78)


def test_a_loss_that_goes_wrong_before_anything_could_be_learned_is_a_crash() -> None:
    found = judged(curve((0, 4.8), (30, 3.4), (31, 9.0), (400, 9.0)))
    assert (found.label, found.onset_step) == ("crash", 31)


def test_the_fall_down_to_chance_does_not_count_as_learning() -> None:
    # From 4.8 to 3.2 is 0.44 of the way to 1.2; to 2.3 it is 0.69, and yet less than half of what is to be learned.
    assert judged(curve((0, 4.8), (50, 2.3), (400, 2.3))).label == "never-learned"


def test_a_run_that_had_learned_and_lost_it_within_the_margin_is_not_said_never_to_have_learned() -> None:
    reference = Reference(0.0, 50)
    losses = curve((0, 2.3), (100, 1.0), (200, 1.0), (210, 1.25), (400, 1.25))
    assert label_of(losses, chance=2.3, reference=reference).label == "degraded"


def test_a_run_between_half_and_sound_is_degraded_and_has_no_onset() -> None:
    found = judged(curve((0, 4.8), (100, 1.9), (400, 1.9)))
    assert (found.label, found.onset_step) == ("degraded", None)
    assert found.covered == pytest.approx(0.65)


def test_a_high_start_is_no_excursion() -> None:
    assert judged(curve((0, 60.0), (30, 4.0), (100, 1.2), (400, 1.2))).label == "healthy"


def test_where_chance_is_high_losing_half_of_what_was_learned_is_enough() -> None:
    # A quarter of 2.8 lies above chance.
    assert margin(2.8, 3.4, 0.0) == pytest.approx(0.3)
    assert margin(2.2, 3.2, 0.0) == pytest.approx(0.5)
    losses = curve((0, 4.0), (100, 2.2), (200, 2.2), (201, 2.71), (400, 2.71))
    found = label_of(losses, chance=3.2, reference=Reference(2.2, 50))
    assert (found.label, found.onset_step) == ("crash", 201)


def test_a_loss_that_wanders_at_chance_does_not_crash() -> None:
    losses = CHANCE + 0.13 * np.sin(np.arange(STEPS) / 20)
    assert judged(losses).label == "never-learned"


def test_the_margin_is_at_least_three_tenths_of_a_nat() -> None:
    assert margin(3.19, CHANCE, 0.0) == margin(0.01, CHANCE, 0.0) == margin(4.0, CHANCE, 0.0) == 0.3


def test_a_noisy_loss_has_a_margin_that_its_noise_does_not_pass() -> None:
    noise = np.random.default_rng(2).normal(0, 0.25, 2000)
    losses = np.concatenate([np.linspace(3.2, 1.2, 100), np.full(1900, 1.2)]) + noise
    assert scatter(losses) == pytest.approx(0.25, rel=0.15)
    assert margin(1.2, CHANCE, 0.25) == pytest.approx(0.575)
    assert judged(losses).label == "healthy"


def test_the_scatter_is_of_the_time_before_the_loss_was_lost() -> None:
    losses = SOUND.copy()
    losses[150:] = 10.0 + 5.0 * np.random.default_rng(3).normal(size=STEPS - 150)
    # The drawn line falls by 0.036 a step: that is all there is.
    assert scatter(losses) < 0.04
    assert judged(losses).onset_step == 150


def test_a_single_high_loss_just_before_a_crash_does_not_date_it() -> None:
    losses = SOUND.copy()
    losses[245] = 3.0
    losses[250:] = 3.0
    assert judged(losses).onset_step == 250


def test_a_single_low_loss_within_the_rise_does_not_date_it_either() -> None:
    losses = SOUND.copy()
    losses[250:] = 3.0
    losses[254] = 1.0
    assert judged(losses).onset_step == 250


def test_smooth_is_the_median_of_the_last_eleven() -> None:
    losses = np.random.default_rng(1).normal(size=40)
    smoothed = smooth(losses)
    assert np.isnan(smoothed[:4]).all()
    assert smoothed[4] == np.median(losses[:5])
    assert smoothed[30] == np.median(losses[20:31])
    assert final_loss(losses) == np.median(losses[20:])


def test_the_label_is_the_same_at_another_scale_of_time_and_under_a_longer_tail() -> None:
    losses = SOUND.copy()
    losses[250:] = 3.0
    longer = np.concatenate([losses, np.full(400, 3.0)])
    assert judged(longer).onset_step == judged(losses).onset_step == 250
