import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from diagnostics.detect.approach import MOST_POINTS, SPAN, Rule, chosen_points
from diagnostics.detect.block import Block
from diagnostics.detect.forecast import Calibration, forecast, forecast_at, shipped_calibration
from diagnostics.detect.history import History
from diagnostics.detect.window import Window

Values = NDArray[np.float64]
RULE = Rule(logit=50.0, entropy_frac=0.1, within=5.0, growth=0.5, certainty=2.0, mute_falling=True, score=0.0)
PLAIN = Calibration(rule=RULE)
HEADS = (("a.attn", 0), ("a.attn", 1), ("b.attn", 0))


def run(
    last: int,
    logits: Callable[[Values], Values],
    *,
    every: int = 5,
    entropy: Callable[[Values], Values] = lambda steps: np.full(len(steps), 0.9),
    loss: Callable[[Values], Values] = lambda steps: np.full(len(steps), 3.0),
    blind: tuple[int, ...] = (),
) -> Block:
    """A run of three heads measured every few steps: b.attn.0 moves as told, the others stand still."""
    all_steps = np.arange(last + 1)
    steps = np.unique(np.append(np.arange(0, last + 1, every), last))
    calm = np.ones((len(steps), 2))
    attention = {
        "max_logit": np.concatenate([2.0 * calm, logits(steps.astype(np.float64))[:, None]], axis=1),
        "entropy_frac": np.concatenate([0.9 * calm, entropy(steps.astype(np.float64))[:, None]], axis=1),
    }
    unmeasured = np.isin(steps, blind) | (steps % every != 0)
    for values in attention.values():
        values[unmeasured] = np.nan
    return Block(
        steps=steps,
        every_step=all_steps,
        ends=np.searchsorted(all_steps, steps, side="right"),
        losses=loss(all_steps.astype(np.float64)),
        loss_given=np.ones(last + 1, dtype=np.bool_),
        heads=HEADS,
        attention=attention,
    )


def window_on(block: Block) -> Window:
    return History().window(block, {})


def growing(rate: float, start: float = 1.5) -> Callable[[Values], Values]:
    return lambda steps: start * np.exp(rate * steps)


def numbers(said: Mapping[str, object] | None) -> tuple[int, int, int]:
    assert said is not None
    middle, low, high = said["steps_to_collapse"], said["low"], said["high"]
    assert isinstance(middle, int)
    assert isinstance(low, int)
    assert isinstance(high, int)
    return middle, low, high


def test_exponential_growth_is_forecast_to_reach_the_level_when_it_does() -> None:
    # 1.5 exp(0.03 t) = 50 at t = 116.9, seen at 120; the run is at 80.
    said = forecast(window_on(run(80, growing(0.03))), PLAIN)
    middle, low, high = numbers(said)
    assert said is not None
    assert middle == pytest.approx(36.9 + 2.5, abs=1.5)
    assert low <= 40 <= high
    assert (said["layer"], said["head"], said["signal"]) == ("b.attn", 0, "max_logit")
    assert said["confidence"] == 0.8
    assert json.loads(json.dumps(said)) == said


def test_falling_entropy_is_forecast_too_and_the_soonest_signal_is_named() -> None:
    # 0.9 exp(-0.02 t) = 0.1 at t = 109.9.
    said = forecast(
        window_on(run(60, growing(0.01), entropy=lambda steps: 0.9 * np.exp(-0.02 * steps))), PLAIN
    )
    assert said is not None
    assert said["signal"] == "entropy_frac"
    assert said["steps_to_collapse"] == pytest.approx(49.9 + 2.5, abs=1.5)


@pytest.mark.parametrize("every", [1, 2, 5, 10, 25])
def test_the_forecast_does_not_hang_on_how_often_is_measured(every: int) -> None:
    middle, _, _ = numbers(forecast(window_on(run(100, growing(0.025), every=every)), PLAIN))
    assert middle == pytest.approx(math.log(50 / 1.5) / 0.025 - 100 + every / 2, abs=2)


def test_nothing_is_forecast_where_nothing_heads_there() -> None:
    still = run(100, lambda steps: np.full(len(steps), 8.0))
    falls = run(100, growing(-0.02, start=40.0))
    slow = run(100, growing(0.002, start=8.0))
    for block in (still, falls, slow):
        assert forecast(window_on(block), PLAIN) is None


def test_nothing_is_forecast_from_afar() -> None:
    # 1.5 exp(0.03 t) is a fifth of 50 at t = 63.2.
    assert forecast(window_on(run(60, growing(0.03))), PLAIN) is None
    assert forecast(window_on(run(65, growing(0.03))), PLAIN) is not None


def test_nothing_is_forecast_while_the_loss_clearly_falls() -> None:
    falling = run(80, growing(0.03), loss=lambda steps: 3.0 - 0.01 * steps)
    assert forecast(window_on(falling), PLAIN) is None
    assert forecast(window_on(run(80, growing(0.03))), PLAIN) is not None


def test_a_head_that_is_dead_already_is_not_forecast() -> None:
    assert forecast(window_on(run(130, growing(0.03))), PLAIN) is None


def test_noise_without_drift_is_not_forecast() -> None:
    rng = np.random.default_rng(3)
    said = 0
    for _ in range(40):
        window = window_on(run(100, lambda steps: 5 * np.exp(0.05 * rng.normal(size=len(steps)))))
        said += forecast(window, PLAIN) is not None
    assert said == 0


def test_beyond_the_horizon_is_null() -> None:
    far = Calibration(middle=1e3, rule=RULE)
    assert forecast(window_on(run(80, growing(0.03))), far) is None


def test_the_calibration_widens_the_interval() -> None:
    window = window_on(run(80, growing(0.03)))
    middle, low, high = numbers(forecast(window, PLAIN))
    wider = Calibration(widen=2.0, rule=RULE)
    assert numbers(forecast(window, wider))[0] == middle
    # As if five steps had gone before; the upper end has the gap of 5 to the next measured step besides.
    assert numbers(forecast(window, wider))[1] == pytest.approx((low + 5) / 2 - 5, abs=1)
    assert numbers(forecast(window, wider))[2] == pytest.approx(2 * (high - 5 + 5) - 5 + 5, abs=3)


def test_points_that_were_not_measured_do_not_hide_the_growth() -> None:
    whole = numbers(forecast(window_on(run(80, growing(0.03))), PLAIN))
    gaps = numbers(forecast(window_on(run(80, growing(0.03), blind=(40, 55, 70))), PLAIN))
    assert gaps[0] == pytest.approx(whole[0], abs=1)


def test_an_unmeasured_last_step_counts_down_from_the_last_measured_one() -> None:
    at_80 = numbers(forecast(window_on(run(80, growing(0.03))), PLAIN))
    at_84 = numbers(forecast(window_on(run(84, growing(0.03))), PLAIN))
    assert at_84 == tuple(steps - 4 for steps in at_80)


def test_too_few_points_are_no_forecast() -> None:
    assert forecast(window_on(run(20, growing(0.1), every=10)), PLAIN) is None


def test_a_run_without_attention_has_no_forecast() -> None:
    block = Block(
        steps=np.arange(0, 50, 5),
        every_step=np.arange(46),
        ends=np.arange(0, 50, 5) + 1,
        losses=np.full(46, 2.0),
        loss_given=np.ones(46, dtype=np.bool_),
    )
    assert forecast(window_on(block), PLAIN) is None
    assert forecast(window_on(block.part(0, 0)), PLAIN) is None


def test_a_forecast_needs_a_detector_near_its_edge_where_the_rule_says_so() -> None:
    window = window_on(run(80, growing(0.03)))
    needs = Calibration(rule=replace(RULE, score=0.5))
    window.scores["logit-growth"] = np.full(len(window), 0.4)
    assert forecast(window, needs) is None
    window.scores["logit-growth"][-1] = 0.6
    assert forecast(window, needs) is not None


@pytest.mark.parametrize("cut", [1, 3, 7])
def test_any_cut_into_blocks_gives_the_same_forecasts_bit_for_bit(cut: int) -> None:
    rng = np.random.default_rng(11)
    block = run(180, lambda steps: 1.5 * np.exp(0.018 * steps + 0.05 * rng.normal(size=len(steps))), every=3)
    whole = window_on(block)
    expected = [forecast_at(whole, frame, PLAIN) for frame in range(len(whole))]
    assert sum(said is not None for said in expected) > 10
    history = History()
    for first in range(0, len(block), cut):
        piece = history.window(block.part(first, min(first + cut, len(block))), {})
        assert forecast(piece, PLAIN) == expected[first + len(piece) - 1]


def test_the_medians_of_brownian_heads_split_the_arrivals_in_half() -> None:
    rng = np.random.default_rng(7)
    # The law itself, without the caution that takes the slower of two slopes.
    trend = Calibration(rule=replace(RULE, recent=SPAN))
    sooner = []
    for _ in range(150):
        walk = 0.5 + np.cumsum(rng.normal(0.03, 0.05, size=400))
        values = np.exp(walk)
        block = run(80, lambda steps, values=values: values[steps.astype(np.int64)])  # type: ignore[misc]
        said = forecast(window_on(block), trend)
        if said is not None:
            sooner.append(np.argmax(values[80::5] >= 50.0) * 5 <= said["steps_to_collapse"])
    assert len(sooner) > 100
    # Three standard errors of a share of a hundred.
    assert np.mean(sooner) == pytest.approx(0.5, abs=0.15)


def test_the_shipped_calibration_says_80_percent_and_names_its_levels() -> None:
    shipped = shipped_calibration()
    assert shipped.confidence == 0.8
    assert 0.5 < shipped.widen < 8.0
    assert shipped.rule.logit > 1.0
    assert 0.0 < shipped.rule.entropy_frac < 1.0


@pytest.mark.parametrize("count", [5, 11, 12, 30, 51])
def test_points_are_thinned_to_few_with_the_newest_and_the_oldest_kept(count: int) -> None:
    steps = np.arange(count)
    points = chosen_points(steps)
    assert len(points) == min(count, MOST_POINTS)
    assert (points[0], points[-1]) == (0, count - 1)
    assert (np.diff(points) > 0).all()


def test_coarse_frames_reach_back_over_enough_of_them() -> None:
    assert chosen_points(np.arange(0, 2000, 100)).tolist() == [15, 16, 17, 18, 19]
