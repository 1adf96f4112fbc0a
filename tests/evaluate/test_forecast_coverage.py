import math

import numpy as np
import pytest

from diagnostics.detect.approach import Approach, Rule
from diagnostics.detect.block import Block
from diagnostics.detect.first_passage import first_passage_quantile
from diagnostics.detect.forecast import Calibration
from diagnostics.detect.history import History
from sample_runs.evaluate.forecast_coverage import (
    LARGEST,
    Issued,
    coverage,
    fitted,
    held_out,
    issued,
    judged,
)
from sample_runs.evaluate.product_limit import product_limit_quantile

RULE = Rule(logit=50.0, entropy_frac=0.1, within=5.0, growth=0.5, score=0.0)
HEADING = Approach(
    "a.attn", 0, "max_logit", level=50.0, value=10.0, distance=1.0, drift=0.02, sigma=0.03, gap=0
)
LOW, MIDDLE, HIGH = (first_passage_quantile(share, 1.0, 0.02, 0.03) for share in (0.1, 0.5, 0.9))


def one(came: float, left: float = 300.0, run: str = "a", family: str = "x") -> Issued:
    return Issued(run, family, 0, HEADING, came, left)


def test_quantiles_without_censoring_are_those_of_the_sample() -> None:
    times = np.array([3.0, 1.0, 2.0, 5.0, 4.0])
    came, weights = np.ones(5, dtype=np.bool_), np.ones(5)
    assert [product_limit_quantile(times, came, weights, share) for share in (0.2, 0.5, 0.6, 1.0)] == [
        1,
        3,
        3,
        5,
    ]


def test_quantiles_with_censoring_are_those_of_kaplan_and_meier() -> None:
    # Survival after 1: 4/5; after 3 (one lost at 2): 4/5 * 2/3 = 8/15; after 5 (one lost at 4): 0.
    times, came = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([True, False, True, False, True])
    shares = (0.2, 0.46, 7 / 15, 0.5)
    assert [product_limit_quantile(times, came, np.ones(5), share) for share in shares] == [1, 3, 3, 5]
    never = np.array([True, False, False, False, False])
    assert product_limit_quantile(times, never, np.ones(5), 0.5) == math.inf


def test_intervals_that_hold_the_event_cover_and_the_others_do_not() -> None:
    # Four runs, one forecast each: inside, before, behind, never though the run went on.
    came = (MIDDLE, LOW / 3, HIGH * 3, math.inf)
    cases = [one(steps, run=str(i)) for i, steps in enumerate(came)]
    found = coverage(judged(cases, Calibration(rule=RULE)))
    assert (found.runs, found.forecasts, found.open) == (4, 4, 0)
    assert (found.covered, found.early, found.late, found.never) == (0.25, 0.25, 0.5, 0.25)


def test_a_forecast_beyond_the_end_of_its_run_is_neither_right_nor_wrong() -> None:
    cases = [one(MIDDLE, run="a"), one(math.inf, left=HIGH / 2, run="b")]
    found = coverage(judged(cases, Calibration(rule=RULE)))
    assert (found.forecasts, found.open, found.covered, found.floor) == (1, 1, 1.0, 0.5)


def test_a_run_counts_once_however_many_forecasts_it_has() -> None:
    cases = [one(LOW / 3, run="long")] * 9 + [one(MIDDLE, run="short")]
    assert coverage(judged(cases, Calibration(rule=RULE))).covered == pytest.approx(0.5)


def test_factors_fitted_on_some_families_cover_another_as_often_as_they_say() -> None:
    """The events come half as fast again as the law says, and scatter three times as much: the factors put that right."""
    rng = np.random.default_rng(4)
    cases = []
    for number in range(600):
        times = MIDDLE * 1.5 * math.exp(0.5 * rng.normal())
        left = float(rng.uniform(150, 600))
        cases.append(
            one(times if times <= left else math.inf, left, run=str(number), family="xyz"[number % 3])
        )
    raw = coverage(judged(cases, Calibration(rule=RULE)))
    found = held_out(cases, RULE)
    assert raw.covered < 0.6
    assert found["all"].covered == pytest.approx(0.8, abs=0.05)
    assert {*found} == {"x", "y", "z", "all"}
    assert found["all"].pinball < raw.pinball
    assert fitted(cases, RULE).middle == pytest.approx(1.5, abs=0.15)


def test_few_runs_to_fit_on_give_wider_intervals() -> None:
    rng = np.random.default_rng(5)
    cases = [one(float(MIDDLE * math.exp(0.6 * rng.normal())), run=str(number)) for number in range(400)]
    # 0.8 * (n + 1) / n is beyond 1 with three runs: the widest there is stands for what is not known.
    assert fitted(cases[:3], RULE).widen == LARGEST
    assert 1.0 < fitted(cases, RULE).widen < 2.0
    assert fitted([], RULE) == Calibration(rule=RULE)


def test_what_came_is_read_off_the_tables() -> None:
    steps = np.arange(0, 205, 5)
    logits = np.stack([np.full(41, 2.0), 1.5 * np.exp(0.03 * steps)], axis=1)
    block = Block(
        steps=steps,
        every_step=np.arange(201),
        ends=steps + 1,
        losses=np.full(201, 3.0),
        loss_given=np.ones(201, dtype=np.bool_),
        heads=(("a.attn", 0), ("a.attn", 1)),
        attention={"max_logit": logits, "entropy_frac": np.full((41, 2), 0.9)},
    )
    nowhere = np.zeros(41, dtype=np.bool_)
    found = issued(History().window(block, {}), nowhere, "run", "family", RULE)
    # 1.5 exp(0.03 t) passes a fifth of 50 at 63.2 and 50 at 116.9; the first measured step behind is 120.
    assert [one.step for one in found] == list(range(65, 120, 5))
    assert [one.step + one.came for one in found] == [120.0] * len(found)
    assert all(one.left == 200 - one.step for one in found)
    assert issued(History().window(block, {}), ~nowhere, "run", "family", RULE) == []
