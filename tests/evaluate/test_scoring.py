"""How alarms are scored on one run, and summed up over many."""

import pytest
from proof_courses import course

from sample_runs.evaluate.figures import pooled
from sample_runs.evaluate.scoring import episodes, judge


def test_alarms_within_fifty_steps_of_the_one_before_are_one_episode() -> None:
    assert episodes([300, 10, 60, 110, 161]) == (10, 161, 300)


def test_an_alarm_before_the_onset_is_a_hit_and_the_first_one_gives_the_lead() -> None:
    outcome = judge(course("crash", onset=400), [390, 250])
    assert (outcome.verdict, outcome.lead) == ("hit", 150)
    assert outcome.within == (True, True, True)


def test_recall_within_ten_steps_asks_for_an_episode_that_begins_there() -> None:
    assert judge(course("crash", onset=400), [250]).within == (False, False, True)


@pytest.mark.parametrize("step", [400, 401, 450])
def test_an_alarm_at_the_onset_or_later_is_a_miss(step: int) -> None:
    outcome = judge(course("crash", onset=400), [step])
    assert (outcome.verdict, outcome.lead, outcome.false) == ("late", 0, 0)


def test_an_alarm_before_the_horizon_is_neither_a_hit_nor_false() -> None:
    outcome = judge(course("crash", onset=400), [100])
    assert (outcome.verdict, outcome.lead, outcome.false) == ("early", 0, 0)
    assert (outcome.early, outcome.early_steps) == (1, 200)


def test_the_last_step_of_the_horizon_counts() -> None:
    assert judge(course("crash", onset=400), [200]).lead == 200
    assert judge(course("crash", onset=400), [199]).verdict == "early"


def test_a_prediction_that_stands_is_not_held_to_the_horizon() -> None:
    outcome = judge(course("crash", onset=400), [0], standing=True)
    assert (outcome.verdict, outcome.lead) == ("hit", 400)


def test_every_episode_of_a_healthy_run_is_false() -> None:
    outcome = judge(course("healthy"), [0, 30, 200])
    assert (outcome.verdict, outcome.false, outcome.quiet_steps) == ("false", 2, 500)


def test_around_a_spike_that_heals_alarms_count_for_nothing() -> None:
    spiky = course("spike-recovered", onset=300, recovered=340)
    outcome = judge(spiky, [99, 160, 300, 390])
    assert outcome.false == 1
    # Steps 100 to 390 are excused.
    assert outcome.quiet_steps == 500 - 291


def test_a_degraded_run_counts_for_nothing() -> None:
    outcome = judge(course("degraded"), [10])
    assert (outcome.false, outcome.quiet_steps) == (0, 0)


def test_misses_count_as_leads_of_zero() -> None:
    outcomes = [
        judge(course("crash", onset=400), [300]),
        judge(course("never-learned", onset=60), [40]),
        judge(course("crash", onset=400), []),
        judge(course("healthy"), [7]),
        judge(course("healthy"), []),
    ]
    figures = pooled(outcomes)
    assert figures.leads == (0, 20, 100)
    told = figures.to_dict()
    assert (told["recall"], told["lead_median"], told["lead_quartiles"]) == (0.6667, 20.0, [10.0, 60.0])
    assert (told["false_per_1000"], told["healthy_share"]) == (1.0, 0.5)
    assert told["warned_at_least"] == {"10": 0.6667, "50": 0.3333}
