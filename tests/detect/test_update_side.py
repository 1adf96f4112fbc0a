"""Updates, second moments, learning rates, dead heads, and the word that it is not attention."""

import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from diagnostics.detect.bands import Band
from diagnostics.detect.block import Block
from diagnostics.detect.dead_heads import DeadHeads
from diagnostics.detect.detector import Detector
from diagnostics.detect.finding import Finding
from diagnostics.detect.history import History
from diagnostics.detect.learning_rate import LearningRateJump
from diagnostics.detect.not_attention import NotAttention
from diagnostics.detect.second_moment import StaleSecondMoment
from diagnostics.detect.update_spike import UpdateSpike

Array = NDArray[Any]
KINDS: tuple[type[Detector], ...] = (
    DeadHeads,
    UpdateSpike,
    StaleSecondMoment,
    LearningRateJump,
    NotAttention,
)
HEADS = (("blocks.0.attn", 0), ("blocks.0.attn", 1))
MATRICES = tuple(f"blocks.{block}.attn.{name}.weight" for block in range(3) for name in ("key", "query"))
EDGES = {"update-spike": 3.0, "stale-second-moment": 2.3, "learning-rate-jump": 3.0}
"""Of our own, so that these tests hold whatever the corpus says of the shipped ones."""
Scores = Mapping[str, Array]


def run_of(
    steps: int,
    *,
    every: int = 5,
    begin: int = 0,
    losses: Array | None = None,
    lr: Array | None = None,
    rms: Array | None = None,
    ratio: Array | None = None,
    attention: Mapping[str, Array] | None = None,
    sigma1: Array | None = None,
) -> Block:
    """A run's frames; per-step arrays of length `steps`, per-frame ones of one row per measured step.

    `ratio` has a column for each of the run's matrices.

    Steps after the last measured one make a frame of their own in which nothing was measured.
    """
    every_step = np.arange(begin, begin + steps)
    ends = np.flatnonzero(every_step % every == 0) + 1
    trailing = bool(ends[-1] != steps)

    def rows(values: Array, width: int) -> Array:
        wide = np.broadcast_to(
            np.asarray(values, dtype=np.float64).reshape(len(ends), -1), (len(ends), width)
        )
        return np.concatenate([wide, np.full((int(trailing), width), np.nan)])

    closes = np.append(ends, steps) if trailing else ends
    given = losses if losses is not None else np.full(steps, 3.0)
    matrices = () if ratio is None else MATRICES[: ratio.shape[1]]
    scalars = {"lr": lr, "adam_rms": rms}
    heads = dict(attention or {})
    return Block(
        steps=every_step[closes - 1],
        every_step=every_step,
        ends=closes,
        losses=given,
        loss_given=np.ones(steps, dtype=np.bool_),
        scalars={name: values for name, values in scalars.items() if values is not None},
        heads=HEADS if heads or sigma1 is not None else (),
        attention={name: rows(values, len(HEADS)) for name, values in heads.items()},
        spectra={} if sigma1 is None else {"sigma1": rows(sigma1, len(HEADS))},
        parameters=matrices,
        updates={} if ratio is None else {"ratio": rows(ratio, len(matrices))},
    )


def measured(steps: int, every: int = 5) -> Array:
    return np.arange(0, steps, every)


def told(
    kind: type[Detector],
    block: Block,
    cuts: Iterable[int] = (),
    *,
    saved: bool = False,
    others: Scores | None = None,
    band: Band | None = None,
) -> tuple[list[Finding], Array]:
    """Findings and scores of one detector; `others`: what the detectors before it said at each frame."""
    by = band or Band({"plain": EDGES.get(kind.kind, 1.0)})
    history, detector = History(), kind(by)
    scores = []
    for first, last in pairwise([0, *sorted({*cuts} - {0, len(block)}), len(block)]):
        if saved:
            state = json.loads(json.dumps({"history": history.state_dict(), "own": detector.state_dict()}))
            history, detector = History(), kind(by)
            history.load_state_dict(state["history"])
            detector.load_state_dict(state["own"])
        window = history.window(block.part(first, last), {})
        window.scores.update({name: values[first:last] for name, values in (others or {}).items()})
        detector.feed(window)
        scores.append(window.scores[kind.kind])
    return detector.findings(), np.concatenate(scores)


def findings(kind: type[Detector], block: Block, others: Scores | None = None) -> list[Finding]:
    return told(kind, block, others=others)[0]


# ---- update spike


def ratios(
    steps: int, every: int = 5, *, usual: float = 5e-3, seed: int = 0, matrices: int = 2, spread: float = 0.25
) -> Array:
    """(F, matrices) ratios of a healthy run: lognormal about their level."""
    shape = (len(measured(steps, every)), matrices)
    return usual * np.random.default_rng(seed).lognormal(0, spread, shape)


LASTING = {1: 15, 2: 8, 5: 3, 10: 2, 50: 1}
"""Measurements after the first high one until two in a row were high for 15 steps, by their distance in steps."""


@pytest.mark.parametrize("every", LASTING)
def test_an_update_far_above_its_own_band_is_told_once_two_measurements_and_fifteen_steps_say_so(
    every: int,
) -> None:
    ratio = ratios(60 * every, every)
    at = 36  # frames; step 30 lies behind even with every=1
    ratio[at : at + 20, 1] *= 12
    (finding,) = findings(UpdateSpike, run_of(60 * every, every=every, ratio=ratio))
    assert (finding.kind, finding.severity, finding.status) == ("update-spike", "warning", "at-risk")
    raised = at + LASTING[every]
    assert (finding.first_step, finding.raised_step) == (at * every, raised * every)
    assert finding.layer == "blocks.0.attn.query"
    assert finding.evidence["parameter"] == MATRICES[1]
    within = ratio[at + 1 : raised + 1, 1]
    assert finding.evidence["jump"] == pytest.approx(
        within.min() / np.median(ratio[at - 8 : at, 1]), abs=1e-4
    )
    assert finding.evidence["jump_beyond_the_others"] == finding.evidence["jump"]
    assert (finding.evidence["matrices_spiking"], finding.evidence["matrices"]) == (1, 2)
    assert "spectral-bound --tau 0.01" in finding.advice


def test_one_bad_batch_that_the_momentum_carries_on_is_no_spike() -> None:
    ratio, rms = np.full((200, 2), 5e-3), np.ones(200)
    ratio[100:] *= 1 + 8 * 0.9 ** np.arange(100)[:, None]
    rms[100:] += 20 * 0.8 ** np.arange(100)
    block = run_of(200, every=1, ratio=ratio, rms=rms)
    # Far above both edges for more than ten steps in a row.
    assert (ratio[100:111] > 3.0 * 5e-3).all()
    assert (rms[100:111] > 2.3).all()
    assert findings(UpdateSpike, block) == []
    assert findings(StaleSecondMoment, block) == []


@pytest.mark.parametrize("every", [5, 50])
def test_one_odd_update_heals_by_itself(every: int) -> None:
    ratio = ratios(100 * every, every)
    ratio[50] *= 100
    found, scores = told(UpdateSpike, run_of(100 * every, every=every, ratio=ratio))
    assert found == []
    # Where measurements lie further apart than 15 steps, it is the next one alone that says so.
    assert (scores[50] > 1.0) == (every == 50)


def test_a_jump_of_one_matrix_among_others_counts_in_full() -> None:
    ratio = ratios(500, matrices=5, spread=0.05)
    ratio[50:60, 3] *= 12
    (finding,) = findings(UpdateSpike, run_of(500, ratio=ratio))
    assert finding.evidence["parameter"] == MATRICES[3]
    assert finding.evidence["jump_beyond_the_others"] == finding.evidence["jump"]
    assert finding.evidence["jump"] == pytest.approx(12, rel=0.2)


@pytest.mark.parametrize(("matrices", "share"), [(3, 1.0), (4, 0.25), (6, 0.25)])
def test_a_jump_that_the_median_matrix_makes_too_counts_for_a_quarter(matrices: int, share: float) -> None:
    ratio = np.full((100, matrices), 5e-3)
    ratio[50:60] *= 10
    scores = told(UpdateSpike, run_of(500, ratio=ratio), band=Band({"plain": 1.0}))[1]
    # In the first two of the ten it has not lasted for 15 steps yet.
    assert scores[50:54] == pytest.approx([0.0, 0.0, 10 * share, 10 * share])
    assert bool(findings(UpdateSpike, run_of(500, ratio=ratio))) == (10 * share > 3.0)


def test_a_large_jump_of_all_matrices_is_told_all_the_same() -> None:
    ratio = np.full((100, 6), 5e-3)
    ratio[50:60] *= 20
    (finding,) = findings(UpdateSpike, run_of(500, ratio=ratio))
    assert (finding.evidence["jump"], finding.evidence["jump_beyond_the_others"]) == (20.0, 5.0)
    assert finding.evidence["jump_beyond_the_others_healthy"] == "below 3"
    assert (finding.evidence["matrices_spiking"], finding.evidence["matrices"]) == (6, 6)


def test_the_excess_over_the_jump_of_all_counts_in_full() -> None:
    ratio = np.full((100, 6), 5e-3)
    ratio[50:60] *= 2.5
    assert findings(UpdateSpike, run_of(500, ratio=ratio)) == []
    ratio[50:60, 4] *= 8
    (finding,) = findings(UpdateSpike, run_of(500, ratio=ratio))
    assert finding.evidence["parameter"] == MATRICES[4]
    assert (finding.evidence["jump"], finding.evidence["jump_beyond_the_others"]) == (20.0, 8.0)
    assert finding.evidence["matrices_spiking"] == 1


def test_a_matrix_that_was_not_judged_is_none_of_the_others() -> None:
    ratio = np.full((100, 4), 5e-3)
    ratio[50:60] *= 10
    ratio[:, 0] = np.nan
    scores = told(UpdateSpike, run_of(500, ratio=ratio), band=Band({"plain": 1.0}))[1]
    assert scores[52] == pytest.approx(10.0)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("late", [4, 30])
def test_a_matrix_that_jumps_a_little_after_the_others_is_held_against_their_jump(
    *, late: int, saved: bool
) -> None:
    ratio = np.full((150, 6), 5e-3)
    ratio[50:54, :5] *= 6
    ratio[50 + late : 58 + late, 5] *= 6
    block, begins = run_of(750, ratio=ratio), 52 + late
    band = Band({"plain": 1.0})
    for cuts in ([], [begins], range(1, len(block))):
        scores = told(UpdateSpike, block, cuts, saved=saved, band=band)[1]
        assert scores[begins] == pytest.approx(1.5 if late == 4 else 6.0)


def test_updates_that_follow_the_learning_rate_are_no_spike() -> None:
    steps = np.arange(800)
    warmup = np.minimum(1.0, (steps + 1) / 200)
    restart = np.where(
        steps < 400, 0.5 + 0.5 * np.cos(np.pi * steps / 400), 0.5 + 0.5 * np.cos(np.pi * (steps - 400) / 400)
    )
    for lr in (warmup, 1e-3 + restart):
        ratio = ratios(800) * lr[measured(800), None]
        ratio *= 3
        assert findings(UpdateSpike, run_of(800, ratio=ratio, lr=1e-3 * lr)) == []
    step_up = np.where(steps < 400, 1e-4, 3e-3)
    block = run_of(800, ratio=np.repeat(3.0 * step_up[measured(800), None], 2, axis=1), lr=step_up)
    assert told(UpdateSpike, block)[1].max() == 0.0
    # Without the rate on record the restart's jump is not explained.
    ratio = 3 * ratios(800) * (1e-3 + restart)[measured(800), None]
    assert findings(UpdateSpike, run_of(800, ratio=ratio)) != []


def test_a_jump_while_the_loss_clearly_falls_is_none() -> None:
    ratio = ratios(500)
    ratio[40:48] *= 12
    falling = np.linspace(6.0, 1.0, 500)
    assert findings(UpdateSpike, run_of(500, ratio=ratio, losses=falling)) == []
    assert len(findings(UpdateSpike, run_of(500, ratio=ratio))) == 1


def test_small_updates_and_those_of_the_first_steps_never_count() -> None:
    tiny = ratios(500, usual=2e-5)
    tiny[50:58] *= 40
    assert findings(UpdateSpike, run_of(500, ratio=tiny)) == []
    assert findings(UpdateSpike, run_of(500, ratio=100 * tiny)) != []
    early = ratios(60, 1, spread=0.05)
    early[14:30] *= 50
    assert findings(UpdateSpike, run_of(60, every=1, ratio=early)) == []
    early[30:40] *= 50
    assert findings(UpdateSpike, run_of(60, every=1, ratio=early)) != []


def test_matrices_that_start_at_zero_or_do_not_move_are_not_measured_by_that() -> None:
    from_zero = ratios(500)
    from_zero[:12] = 25.0 / np.arange(1, 13)[:, None] ** 2
    assert findings(UpdateSpike, run_of(500, ratio=from_zero)) == []
    frozen = np.zeros((100, 2))
    assert told(UpdateSpike, run_of(500, ratio=frozen))[1].max() == -1.0
    frozen[50:] = ratios(500)[50:]
    block = run_of(500, ratio=frozen)
    scores = told(UpdateSpike, block)[1]
    assert findings(UpdateSpike, block) == []
    # Four measurements of a yardstick, and 15 steps with one measurement more behind them.
    assert (scores[:57] == -1.0).all()
    assert (scores[57:100] >= 0.0).all()


def test_measured_steps_without_an_update_do_not_lower_the_yardstick() -> None:
    ratio = np.full((100, 2), 5e-3)
    ratio[::2] = 0.0
    scores = told(UpdateSpike, run_of(500, ratio=ratio), band=Band({"plain": 1.0}))[1]
    assert (scores[11:100] == 0.0).all()


def test_a_matrix_that_stands_still_now_is_not_judged_by_its_last_steps() -> None:
    ratio = np.full((200, 2), 5e-3)
    ratio[100:120] *= 20
    ratio[116] = 0.0
    scores = told(UpdateSpike, run_of(200, every=1, ratio=ratio))[1]
    assert scores[116] == 0.0
    assert (scores[[115, 117]] > 1.0).all()


def test_what_is_not_finite_is_not_judged() -> None:
    ratio = ratios(500)
    ratio[50:54] = np.array([np.nan, np.inf])
    scores = told(UpdateSpike, run_of(500, ratio=ratio))[1]
    assert (scores[50:54] == -1.0).all()
    assert (scores[12:50] >= 0.0).all()


# ---- stale second moment


def recorded(steps: int, values: Array, every: int = 5) -> Array:
    """Per-step values that are known at measured steps."""
    found = np.full(steps, np.nan)
    found[measured(steps, every)] = values
    return found


def healthy_rms(steps: int, every: int = 5) -> Array:
    return 1.05 * np.random.default_rng(1).lognormal(0, 0.1, len(measured(steps, every)))


@pytest.mark.parametrize("every", LASTING)
def test_gradients_that_outgrow_their_second_moment_are_told_as_information(every: int) -> None:
    steps = 100 * every
    rms = healthy_rms(steps, every)
    rms[52], rms[60:80] = 0.5, 4.0 - 0.05 * np.arange(20)
    (finding,) = findings(StaleSecondMoment, run_of(steps, every=every, rms=recorded(steps, rms, every)))
    assert (finding.severity, finding.status) == ("info", "healthy")
    raised = 60 + LASTING[every]
    assert (finding.first_step, finding.raised_step) == (60 * every, raised * every)
    # They fall, so that the lowest is the newest.
    assert finding.evidence["adam_rms"] == pytest.approx(rms[raised], abs=1e-4)
    assert finding.evidence["adam_rms_usual"] == pytest.approx(np.median(rms[52:60]), abs=1e-4)
    assert "beta2" in finding.advice


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("healthy", healthy_rms(500)),
        ("large in the first steps", np.where(np.arange(100) < 3, 30.0, healthy_rms(500))),
        ("large for good, as the largest of many tensors is", 3.0 * healthy_rms(500)),
        ("one bad batch", np.where(np.arange(100) == 60, 9.0, healthy_rms(500))),
        ("jumps below the level", np.where((np.arange(100) % 20) < 6, 2.2, 0.9)),
        ("above the level, but not twice the usual", np.where(np.arange(100) // 10 == 6, 2.6, 1.4)),
    ],
)
def test_second_moments_that_keep_up_are_not_told(name: str, values: Array) -> None:
    assert findings(StaleSecondMoment, run_of(500, rms=recorded(500, values))) == [], name


def test_gradients_that_outgrow_it_while_the_loss_clearly_falls_are_not_told() -> None:
    rms = recorded(500, np.where(np.arange(100) // 10 == 6, 4.0, healthy_rms(500)))
    assert len(findings(StaleSecondMoment, run_of(500, rms=rms))) == 1
    assert findings(StaleSecondMoment, run_of(500, rms=rms, losses=np.linspace(6.0, 1.0, 500))) == []


def test_a_frame_without_a_second_moment_of_its_own_is_not_judged() -> None:
    rms = recorded(500, healthy_rms(500))
    rms[300:350] = np.nan
    scores = told(StaleSecondMoment, run_of(500, rms=rms))[1]
    # Four new values make a yardstick again; in the last frame, of the steps after the last measured one, is none.
    assert np.flatnonzero(scores[20:] < 0.0).tolist() == [*range(40, 57), 80]


def test_an_optimizer_without_second_moments_is_not_judged() -> None:
    assert (told(StaleSecondMoment, run_of(500))[1] == -1.0).all()


# ---- learning-rate jump


def cosine(steps: int, warmup: int, peak: float = 1e-3) -> Array:
    at = np.arange(steps)
    falling = 0.5 + 0.5 * np.cos(np.pi * (at - warmup) / max(1, steps - warmup))
    return peak * np.where(at < warmup, (at + 1) / max(1, warmup), falling)


def cyclic(steps: int) -> Array:
    return np.tile(cosine(200, 0), steps // 200)


RATES = {
    "constant": np.full(1000, 1e-3),
    "warmup and cosine": cosine(1000, 100),
    "a warmup longer than the run": np.linspace(0.0, 1e-3, 1000),
    "restarts to the old peak": cyclic(1000),
    "restarts after a warmup, a shade above it": np.concatenate(
        [cosine(400, 50), 1.0000001 * cosine(600, 50)]
    ),
    "a warmup by doubling": 1e-5 * 2.0 ** np.minimum(np.arange(1000) // 50, 7),
    "zero at first": np.where(np.arange(1000) < 40, 0.0, 1e-3),
    "two cycles up and down": np.concatenate(
        [np.linspace(1e-4, 1e-3, 250), np.linspace(1e-3, 1e-4, 250)] * 2
    ),
    "half of what it was, and back after a resume": np.where(abs(np.arange(1000) - 500) < 100, 5e-4, 1e-3),
    "not recorded": np.full(1000, np.nan),
}


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("every", [1, 5, 50])
def test_schedules_that_people_use_are_no_jump(name: str, every: int) -> None:
    assert findings(LearningRateJump, run_of(1000, every=every, lr=RATES[name])) == []


@pytest.mark.parametrize("every", [1, 50])
def test_a_warmup_recorded_at_measured_steps_alone_is_no_jump(every: int) -> None:
    lr = cosine(1000, 400)
    lr[np.arange(1000) % 50 > 0] = np.nan
    assert findings(LearningRateJump, run_of(1000, every=every, lr=lr)) == []


@pytest.mark.parametrize("every", [1, 5, 50])
def test_a_rate_ten_times_anything_before_is_told_with_its_step_until_it_is_the_runs_rate(every: int) -> None:
    lr = cosine(3000, 100)
    lr[731:] = 1e-2
    (finding,) = findings(LearningRateJump, run_of(3000, every=every, lr=lr))
    frame = -(-731 // every) * every
    assert (finding.first_step, finding.raised_step) == (frame, frame)
    assert finding.evidence["lr_rose_at_step"] == 731
    assert finding.evidence["lr_factor"] == 10.0
    assert "10-fold at step 731" in finding.message
    assert finding.last_step is not None
    assert 731 + 200 <= finding.last_step <= 731 + 200 + 4 * every


def test_a_jump_is_told_even_where_it_lasts_for_one_step_between_two_measurements() -> None:
    lr = np.full(500, 1e-3)
    lr[222] = 0.1
    (finding,) = findings(LearningRateJump, run_of(500, every=50, lr=lr))
    assert (finding.raised_step, finding.evidence["lr_rose_at_step"]) == (250, 222)
    assert finding.evidence["lr"] == 0.1


def test_a_rate_that_creeps_up_by_rounding_has_settled_all_the_same() -> None:
    lr = 1e-3 * (1 + 1e-9 * np.arange(500))
    lr[400:] *= 10
    assert [one.raised_step for one in findings(LearningRateJump, run_of(500, lr=lr))] == [400]


def test_a_jump_in_two_stages_is_held_against_the_rate_before_both() -> None:
    lr = np.full(500, 1e-3)
    lr[200:] = 2.5e-3
    lr[210:] = 6e-3
    (finding,) = findings(LearningRateJump, run_of(500, lr=lr))
    assert (finding.raised_step, finding.evidence["lr_factor"]) == (210, 6.0)


def test_the_rate_before_a_gap_in_the_record_is_remembered() -> None:
    lr = np.full(2000, 1e-3)
    lr[300:1500] = np.nan
    lr[1500:] = 2e-2
    (finding,) = findings(LearningRateJump, run_of(2000, lr=lr))
    assert finding.raised_step == 1500


# ---- dead heads


def heads_of(frames: int, seed: int = 0) -> dict[str, Array]:
    """Heads that attend: (F, 2) of each column."""
    draw = np.random.default_rng(seed)
    return {
        "entropy_frac": draw.uniform(0.4, 0.8, (frames, 2)),
        "max_logit": draw.uniform(2.0, 4.0, (frames, 2)),
    }


def test_heads_that_attend_are_not_dead() -> None:
    assert findings(DeadHeads, run_of(500, attention=heads_of(100), sigma1=np.full((100, 2), 2.0))) == []


def test_a_head_without_logits_is_dead_and_that_is_told_as_information() -> None:
    columns = heads_of(100)
    columns["entropy_frac"][:, 1], columns["max_logit"][:, 1] = 0.9999, 1e-5
    (finding,) = findings(DeadHeads, run_of(500, attention=columns))
    assert (finding.severity, finding.status) == ("info", "healthy")
    assert (finding.layer, finding.head, finding.first_step) == ("blocks.0.attn", 1, 100)
    assert (finding.evidence["heads_dead"], finding.evidence["heads"]) == (1, 2)


def test_a_head_that_averages_but_has_logits_is_alive_and_so_is_one_that_copies() -> None:
    columns = heads_of(100)
    columns["entropy_frac"][:, 0] = 0.9995
    columns["entropy_frac"][:, 1] = 0.0
    assert findings(DeadHeads, run_of(500, attention=columns, sigma1=np.full((100, 2), 2.0))) == []


def test_a_head_stuck_on_single_keys_is_dead_once_nothing_of_it_changed_for_100_steps() -> None:
    columns, sigma1 = heads_of(100), np.full((100, 2), 2.0)
    columns["entropy_frac"][40:, 0], columns["max_logit"][40:, 0] = 0.0, 512.0
    (finding,) = findings(DeadHeads, run_of(500, attention=columns, sigma1=sigma1))
    assert (finding.head, finding.first_step) == (0, 300)
    sigma1[:, 0] += 1e-3 * np.arange(100)
    assert findings(DeadHeads, run_of(500, attention=columns, sigma1=sigma1)) == []


def test_where_no_logits_were_observed_the_weights_say_it() -> None:
    columns = {"entropy_frac": np.full((100, 2), 1.0)}
    assert len(findings(DeadHeads, run_of(500, attention=columns, sigma1=np.full((100, 2), 1e-6)))) == 1
    assert findings(DeadHeads, run_of(500, attention=columns, sigma1=np.full((100, 2), 1.0))) == []
    assert findings(DeadHeads, run_of(500, attention=columns)) == []


# ---- not attention


def others(frames: int = 100, **scores: Array | float) -> dict[str, Array]:
    """Scores by detector: attention quiet, the loss fine, and what the test says."""
    quiet = {"entropy_collapse": 0.1, "logit_growth": 0.2, "loss_rise": 0.0} | scores
    return {name.replace("_", "-"): np.broadcast_to(value, (frames,)) for name, value in quiet.items()}


def from_frame(frame: int, value: float, frames: int = 100, *, until: int = 100) -> Array:
    at = np.arange(frames)
    return np.where((at >= frame) & (at < until), value, 0.0)


LATER = from_frame(60, 2.0)
QUIET = run_of(496)


def test_a_loss_that_goes_wrong_while_attention_is_quiet_is_not_attention() -> None:
    (finding,) = findings(NotAttention, QUIET, others(loss_rise=LATER))
    assert (finding.severity, finding.status, finding.first_step) == ("info", "healthy", 300)
    assert finding.evidence["wrong"] == ["loss-rise"]
    assert finding.evidence["logit-growth_score"] == 0.2
    assert "schedule" in finding.advice


@pytest.mark.parametrize("kind", ["update_spike", "stale_second_moment", "learning_rate_jump"])
def test_what_left_its_band_just_before_is_named(kind: str) -> None:
    name = kind.replace("_", "-")
    scores = others(loss_rise=LATER) | {name: from_frame(50, 1.5, until=52)}
    (finding,) = findings(NotAttention, QUIET, scores)
    assert finding.evidence["suspects"] == [name]
    assert name in finding.advice
    scores[name] = from_frame(30, 1.5, until=32)
    (finding,) = findings(NotAttention, QUIET, scores)
    assert finding.evidence["suspects"] == []


def test_attention_that_stirred_within_100_steps_is_not_cleared() -> None:
    stirred = from_frame(45, 0.6, until=46)
    assert (
        findings(NotAttention, QUIET, others(loss_rise=from_frame(60, 2.0, until=65), logit_growth=stirred))
        == []
    )
    (finding,) = findings(NotAttention, QUIET, others(loss_rise=LATER, logit_growth=stirred))
    assert finding.first_step == 45 * 5 + 105  # more than 100 steps later


def test_attention_that_was_not_observed_is_not_cleared() -> None:
    unseen = others(loss_rise=LATER, entropy_collapse=-1.0, logit_growth=-1.0)
    assert findings(NotAttention, QUIET, unseen) == []
    assert (told(NotAttention, QUIET, others=unseen)[1] == -1.0).all()
    assert findings(NotAttention, QUIET, {"loss-rise": LATER}) == []


# ---- all of them


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_said_of_a_run_without_any_of_the_numbers(kind: type[Detector]) -> None:
    found, scores = told(kind, run_of(203))
    assert found == []
    assert (scores == -1.0).all()


def drawn(seed: int) -> tuple[Block, dict[str, Array]]:
    """A course in which anything may happen, often: holes, jumps, sharp heads, scores of others about their edges."""
    draw = np.random.default_rng(seed)
    every, steps = int(draw.choice([1, 3, 5, 50])), 300 if seed % 3 else 298
    begin = int(draw.choice([0, 0, 150]))
    frames = int((np.arange(begin, begin + steps) % every == 0).sum())

    def jumpy(shape: tuple[int, ...], level: float, rate: float, hold: int) -> Array:
        held = np.repeat(draw.random(shape) < rate, hold, axis=0)[: shape[0]]
        values = level * draw.lognormal(0, 0.3, shape) * np.where(held, draw.choice([5, 30]), 1)
        values[draw.random(shape) < 0.05] = np.nan
        values[draw.random(shape) < 0.02] = 0.0
        return values

    frames_held, steps_held = max(3, 20 // every + 2), max(22, 3 * every)
    stairs = (
        1e-3
        * np.repeat(draw.choice([0.0, 0.5, 1.0, 1.0, 4.0, 20.0], 20), 30)[:steps]
        * draw.choice([1.0, 1.001], steps)
    )
    stairs[draw.random(steps) < 0.1] = np.nan
    stuck = draw.random((frames, 2)) < 0.5 if seed % 2 else np.ones((frames, 2), dtype=np.bool_)
    block = run_of(
        steps,
        every=every,
        begin=begin,
        losses=5.0 - 3e-3 * np.arange(steps) * (seed % 2) + draw.normal(0, 0.3, steps),
        lr=stairs if seed % 5 else None,
        rms=jumpy((steps,), 1.5, 0.1, steps_held),
        ratio=jumpy((frames, 6 if seed % 4 else 2), 4e-3, 0.02, frames_held)
        * np.where(jumpy((frames, 1), 1.0, 0.02, frames_held) > 3.0, 6.0, 1.0),
        attention={"entropy_frac": np.where(stuck, 0.0, 1.0), "max_logit": np.where(stuck, 9.0, 0.0)},
        sigma1=np.where(draw.random((frames, 2)) < 0.1, np.nan, 1.0),
    )
    names = (
        "logit-growth",
        "entropy-collapse",
        "loss-rise",
        "update-spike",
        "learning-rate-jump",
    )
    scores = {
        name: draw.choice([-1.0, 0.0, 0.2, 1.5], len(block), p=[0.2, 0.4, 0.38, 0.02]) for name in names
    }
    scores["loss-rise"] = draw.choice([0.0, 1.5], len(block))
    return block, scores


LOW_EDGES = {"update-spike": 2.5, "stale-second-moment": 1.5, "learning-rate-jump": 1.5}


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), share=st.floats(0.0, 1.0), saved=st.booleans())
def test_findings_and_scores_are_the_same_bit_for_bit_however_the_run_is_cut(
    *, kind: type[Detector], seed: int, share: float, saved: bool
) -> None:
    block, scores = drawn(seed)
    band = Band({"plain": LOW_EDGES.get(kind.kind, 1.0)})
    cuts = np.flatnonzero(
        np.random.default_rng(seed).random(len(block)) < (share / 5 if saved else share)
    ).tolist()
    whole = told(kind, block, others=scores, band=band)
    cut = told(kind, block, cuts, saved=saved, others=scores, band=band)
    np.testing.assert_array_equal(cut[1], whole[1])
    assert [one.to_dict() for one in cut[0]] == [one.to_dict() for one in whole[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_drawn_courses_make_every_detector_speak(kind: type[Detector]) -> None:
    band = Band({"plain": LOW_EDGES.get(kind.kind, 1.0)})
    spoke = 0
    for seed in range(30):
        block, scores = drawn(seed)
        spoke += bool(told(kind, block, others=scores, band=band)[0])
    assert spoke >= 5


@pytest.mark.parametrize("kind", KINDS)
def test_judging_changes_nothing(kind: type[Detector]) -> None:
    block, scores = drawn(1)
    detector = kind(Band({"plain": 1.0}))
    before = json.dumps(detector.state_dict())
    window = History().window(block, {})
    window.scores.update(scores)
    first, second = detector.judge(window), detector.judge(window)
    np.testing.assert_array_equal(first.score, second.score)
    assert json.dumps(detector.state_dict()) == before


def test_what_is_said_comes_with_the_healthy_band_measured_where_there_is_one() -> None:
    ratio = ratios(500)
    ratio[50:58] *= 40
    rms = healthy_rms(500)
    rms[50:58] = 9.0
    lr = np.where(np.arange(500) < 300, 1e-3, 1e-2)
    block = run_of(500, ratio=ratio, rms=recorded(500, rms), lr=lr)
    for kind, name in (
        (UpdateSpike, "jump_beyond_the_others_healthy"),
        (StaleSecondMoment, "adam_rms_healthy"),
        (LearningRateJump, "lr_factor_healthy"),
    ):
        plain = told(kind, block, band=Band({"plain": 2.5}))[0][0]
        assert plain.evidence[name] == "below 2.5"
        known = told(kind, block, band=Band({"plain": 2.5}, {"p50": 0.5, "p99": 1.0, "max": 1.25}))[0][0]
        assert "1.25" in known.evidence[name]
        json.dumps(known.to_dict(), allow_nan=False)


def test_none_of_it_imports_torch() -> None:
    modules = ", ".join(kind.__module__ for kind in KINDS)
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
