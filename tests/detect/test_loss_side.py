"""The detectors that need the loss only (and the gradient norm where it is known), beside healthy look-alikes."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diagnostics.detect.bands import Band
from diagnostics.detect.block import Block, Values
from diagnostics.detect.detector import Detector
from diagnostics.detect.divergence import Divergence
from diagnostics.detect.finding import Finding
from diagnostics.detect.history import History
from diagnostics.detect.loss_rise import LossRise
from diagnostics.detect.loss_spike import LossSpike
from diagnostics.detect.loss_stall import LossStall, NeverLearned

LOSS_SIDE: tuple[type[Detector], ...] = (
    LossSpike,
    LossRise,
    LossStall,
    NeverLearned,
    Divergence,
)
EDGES = {"loss-spike": 4.6}
"""Of our own, so that these tests hold whatever edge ships."""


def block_of(
    losses: Sequence[float | None] | NDArray[np.floating[Any]], norms: Values | None = None, every: int = 1
) -> Block:
    """One loss a step, None for one that was not handed in; every so many steps are a frame."""
    given = np.array([loss is not None for loss in losses])
    values = np.array([np.nan if loss is None else loss for loss in losses], dtype=np.float64)
    steps = np.arange(len(values), dtype=np.int64)
    ends = np.unique(np.append(np.arange(1, len(values) + 1, every), len(values))).astype(np.int64)
    scalars = {} if norms is None else {"grad_norm": norms}
    return Block(
        steps=steps[ends - 1], every_step=steps, ends=ends, losses=values, loss_given=given, scalars=scalars
    )


def found(block: Block, cuts: Sequence[int] = (), *, resume: bool = False) -> dict[str, list[Finding]]:
    """The findings of every detector; `cuts`: frames before which a new block begins, resumed from saved states."""
    detectors = [kind(Band({"plain": EDGES.get(kind.kind, 1.0)})) for kind in LOSS_SIDE]
    history = History()
    edges = [0, *cuts, len(block)]
    for first, last in pairwise(edges):
        window = history.window(block.part(first, last), {})
        for detector in detectors:
            detector.feed(window)
        if resume:
            fresh = History()
            fresh.load_state_dict(history.state_dict())
            history = fresh
            resumed = [kind(detector.band) for kind, detector in zip(LOSS_SIDE, detectors, strict=True)]
            for new, old in zip(resumed, detectors, strict=True):
                new.load_state_dict(old.state_dict())
            detectors = resumed
    return {detector.kind: detector.findings() for detector in detectors}


def kinds(block: Block) -> list[str]:
    """Of the findings that change a run's status."""
    return [kind for kind, some in found(block).items() if any(one.status != "healthy" for one in some)]


def falling(steps: int = 400, noise: float = 0.03, seed: int = 0) -> Values:
    """A healthy course: 5.5 falls to 2 with a scale of 60 steps."""
    rng = np.random.default_rng(seed)
    return 2.0 + 3.5 * np.exp(-np.arange(steps) / 60) + rng.normal(0, noise, steps)


@pytest.mark.parametrize(
    "losses",
    [
        falling(),
        falling(noise=0.3),
        -falling()[::-1],
        1e-7 * falling(),
        np.zeros(400),
        np.full(400, -3.0),
        np.round(10 * falling()),
    ],
    ids=["plain", "noisy", "negative", "tiny", "zero", "constant", "integers"],
)
def test_healthy_losses_of_any_size_and_sign_raise_no_spike_and_no_rise(losses: Values) -> None:
    of = found(block_of(losses))
    assert of["loss-spike"] == of["loss-rise"] == of["divergence"] == []


def test_losses_of_two_kinds_of_batches_are_healthy() -> None:
    rng = np.random.default_rng(1)
    mixed = falling(2000) - 1.0 + np.where(rng.random(2000) < 0.4, rng.uniform(0.5, 2.5, 2000), 0.0)
    assert kinds(block_of(mixed)) == []


def test_five_high_losses_in_a_row_are_a_spike_and_four_are_none() -> None:
    spike, shorter = falling(), falling()
    spike[250:255] += 1.0
    shorter[250:254] += 1.0
    (finding,) = found(block_of(spike))["loss-spike"]
    assert found(block_of(shorter))["loss-spike"] == []
    assert (finding.first_step, finding.raised_step, finding.status) == (250, 254, "at-risk")
    assert finding.last_step is not None
    assert finding.evidence["loss_lowest_of_5"] == round(float(spike[250:255].min()), 4)
    assert finding.evidence["loss_usual"] == pytest.approx(2.1, abs=0.1)
    assert "2.1" in finding.message or "2.0" in finding.message
    assert "5 steps in a row" in finding.message


def test_five_high_losses_with_a_usual_one_among_them_are_no_spike() -> None:
    broken = falling()
    broken[250:256] += 1.0
    broken[253] -= 1.0
    assert found(block_of(broken))["loss-spike"] == []


@pytest.mark.parametrize("every", [1, 2, 5, 50])
def test_a_spike_is_told_at_the_frame_that_ends_behind_its_fifth_loss(every: int) -> None:
    spike = falling()
    spike[250:255] += 1.0
    (finding,) = found(block_of(spike, every=every))["loss-spike"]
    assert (finding.first_step, finding.raised_step) == (250, -(-254 // every) * every)


def test_a_shift_of_the_gradient_norm_makes_a_small_jump_a_spike() -> None:
    jumped = falling(noise=0.05)
    jumped[250:] += 0.21
    rng = np.random.default_rng(2)
    steady = np.exp(rng.normal(0, 0.05, 400))
    shifted = steady * np.where(np.arange(400) >= 250, 0.5, 1.0)
    assert found(block_of(jumped, steady))["loss-spike"] == []
    (finding,) = found(block_of(jumped, shifted))["loss-spike"]
    assert 254 <= (finding.raised_step or 0) <= 262
    assert finding.evidence["grad_norm_shift"] == 5.0


def test_a_shift_of_the_gradient_norm_alone_is_no_spike() -> None:
    norms = np.where(np.arange(400) >= 250, 5.0, 1.0)
    assert found(block_of(falling(), norms))["loss-spike"] == []


def test_a_loss_that_rises_and_stays_is_divergence_from_the_first_loss_beyond_the_limit() -> None:
    risen = falling()
    risen[300:] += 1.0
    (finding,) = found(block_of(risen))["loss-rise"]
    # Eighteen of twenty losses have risen at step 317: the third lowest of the last twenty is a high one.
    assert (finding.first_step, finding.raised_step, finding.active) == (300, 317, True)
    assert (finding.severity, finding.status) == ("critical", "diverged")
    assert finding.evidence["limit"] == pytest.approx(1.25 * finding.evidence["best_loss_median"], abs=1e-3)
    assert 200 <= finding.evidence["best_step"] < 300


def test_a_rise_of_a_small_loss_counts_by_where_it_began() -> None:
    risen = 0.1 * falling()
    risen[300:] += 0.2
    assert [one.status for one in found(block_of(risen))["loss-rise"]] == ["diverged"]


def test_a_rise_that_heals_has_an_end() -> None:
    healed = falling(600)
    healed[300:360] += 1.0
    (finding,) = found(block_of(healed))["loss-rise"]
    assert finding.last_step is not None
    assert 360 <= finding.last_step < 390


def test_a_rising_negative_loss_is_divergence_too() -> None:
    risen = falling() - 8.0
    risen[300:] += 3.0
    assert [one.first_step for one in found(block_of(risen))["loss-rise"]] == [300]


@pytest.mark.parametrize("every", [1, 7, 100])
def test_non_finite_losses_are_found_from_the_first_of_them(every: int) -> None:
    broken = falling()
    broken[123:] = np.nan
    broken[124] = np.inf
    (finding,) = found(block_of(broken, every=every))["divergence"]
    assert finding.first_step == 123
    assert finding.evidence["first_not_finite_step"] == 123
    assert finding.active


def test_single_non_finite_losses_are_no_divergence_and_hide_nothing() -> None:
    skipped = falling()
    skipped[[50, 123, 125]] = np.inf, np.nan, -np.inf
    assert kinds(block_of(skipped)) == []
    skipped[300:] += 1.0
    skipped[310] = np.nan
    assert "loss-rise" in kinds(block_of(skipped))


def test_non_finite_losses_count_in_a_row_across_steps_without_a_loss() -> None:
    sparse: list[float | None] = [None] * 400
    sparse[::10] = falling(40).tolist()
    sparse[200] = sparse[210] = float("nan")
    (finding,) = found(block_of(sparse))["divergence"]
    assert (finding.first_step, finding.raised_step) == (200, 210)
    assert finding.last_step is not None


def test_losses_handed_in_now_and_then_are_judged_as_they_come() -> None:
    risen = falling(200)
    risen[150:] += 3.0
    sparse: list[float | None] = [None] * 2000
    sparse[::10] = risen.tolist()
    of = found(block_of(sparse))
    assert [one.first_step for one in of["loss-spike"]] == [1500]
    assert [one.first_step for one in of["loss-rise"]] == [1500]


def test_a_run_without_losses_is_judged_by_none() -> None:
    assert all(some == [] for some in found(block_of([None] * 300)).values())


def test_a_finished_training_is_told_and_not_alarmed() -> None:
    of = found(block_of(falling(1200)))
    (finding,) = of["loss-stall"]
    assert (finding.severity, finding.status, finding.active) == ("info", "healthy", True)
    assert of["never-learned"] == []


def test_a_loss_that_never_came_down_is_alarmed() -> None:
    rng = np.random.default_rng(3)
    stuck = 6.9 + rng.normal(0, 0.05, 600)
    (finding,) = found(block_of(stuck))["never-learned"]
    assert finding.status == "at-risk"
    assert 200 <= (finding.raised_step or 0) <= 260
    assert finding.evidence["loss_first"] == pytest.approx(6.9, abs=0.1)


def test_a_loss_that_comes_down_after_long_clears_the_alarm() -> None:
    late = np.concatenate([np.full(300, 6.9), 6.9 - 0.02 * np.arange(200)])
    (finding,) = found(block_of(late))["never-learned"]
    assert finding.last_step is not None
    assert 300 < finding.last_step < 330


def test_a_slow_start_is_no_stall() -> None:
    slow: Values = 6.9 * np.exp(-np.arange(1000) / 2000)
    assert kinds(block_of(slow)) == []


def troubled(seed: int) -> Block:
    """A course with everything in it: gaps, jumps, rises that heal, losses that are none, frames of any length."""
    rng = np.random.default_rng(seed)
    losses = falling(900, noise=float(rng.uniform(0.01, 0.4)), seed=seed)
    for begin in rng.integers(40, 850, 4):
        losses[begin : begin + int(rng.integers(1, 80))] += rng.uniform(0.1, 3.0)
    losses[rng.integers(0, 900, 5)] = np.nan
    losses[700 : 700 + int(rng.integers(0, 5))] = np.inf
    listed: list[float | None] = losses.tolist()
    for gap in rng.integers(0, 880, 3):
        listed[gap : gap + 15] = [None] * 15
    norms = np.exp(rng.normal(0, 0.3, 900))
    norms[500:] *= rng.uniform(0.2, 5.0)
    norms[rng.integers(0, 900, 20)] = np.nan
    return block_of(listed, norms, every=int(rng.integers(1, 12)))


@pytest.mark.parametrize("seed", range(6))
def test_findings_are_the_same_however_the_run_is_cut_into_blocks(seed: int) -> None:
    block = troubled(seed)
    rng = np.random.default_rng(100 + seed)
    whole = found(block)
    assert sum(len(some) for some in whole.values()) > 0
    every_frame = range(1, len(block))
    some = sorted(rng.choice(np.arange(1, len(block)), 9, replace=False).tolist())
    assert found(block, every_frame) == whole
    assert found(block, some) == whole
    assert found(block, some, resume=True) == whole
