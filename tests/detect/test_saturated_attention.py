"""Saturated attention: a model that starts with heads on single keys and does not learn, beside those that do."""

import json
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from blocks import HEADS, block_of

from diagnostics.detect.bands import Band
from diagnostics.detect.block import Block
from diagnostics.detect.finding import Finding
from diagnostics.detect.history import History
from diagnostics.detect.saturated_attention import SaturatedAttention

Course = Callable[[int], Mapping[str, Any]]
BAND = Band({"plain": 1.0})
"""Of our own, so that these tests hold whatever edge ships."""


def told(
    block: Block, cuts: Iterable[int] = (), *, saved: bool = False, band: Band = BAND
) -> tuple[list[Finding], list[float]]:
    """Findings and scores; `cuts`: frames before which a new block begins, `saved`: from a saved state."""
    history, detector = History(), SaturatedAttention(band)
    scores: list[float] = []
    for first, last in pairwise([0, *sorted({*cuts} - {0, len(block)}), len(block)]):
        if saved:
            state = json.loads(json.dumps({"history": history.state_dict(), "own": detector.state_dict()}))
            history, detector = History(), SaturatedAttention(band)
            history.load_state_dict(state["history"])
            detector.load_state_dict(state["own"])
        window = history.window(block.part(first, last), {})
        detector.feed(window)
        scores += window.scores["saturated-attention"].tolist()
    return detector.findings(), scores


def found(course: Course, steps: int = 200, every: int = 5) -> list[Finding]:
    return told(block_of(course, steps, every=every))[0]


def stuck(step: int) -> float:
    return 4.6 + 0.05 * float(np.sin(step))


def learning(step: int) -> float:
    """By 15 % within the first 12 steps."""
    return float(4.6 * np.exp(-step / 60))


def sharp(step: int, loss: Callable[[int], float] = stuck) -> dict[str, Any]:
    """Queries and keys that begin ten times too large: every head sharp, of high rank, and none of it grows."""
    return {
        "loss": loss(step),
        "entropy_frac": 0.02,
        "rank_frac": 0.8,
        "max_logit": 150.0 + step % 3,
        "sec_1": 0.3,
    }


def only(heads: int, course: Course) -> Course:
    """So many of the eight heads as the course has them, the others wide open."""

    def mixed(step: int) -> dict[str, Any]:
        here = np.arange(len(HEADS)) < heads
        row = dict(course(step))
        row["entropy_frac"] = np.where(here, row["entropy_frac"], 0.9)
        row["max_logit"] = np.where(here, row["max_logit"], 3.0)
        return row

    return mixed


def without(course: Course, *names: str) -> Course:
    return lambda step: {name: value for name, value in course(step).items() if name not in names}


@pytest.mark.parametrize("every", [1, 5, 10])
def test_heads_that_start_on_single_keys_in_a_model_that_does_not_learn_are_told_by_step_twenty(
    every: int,
) -> None:
    (finding,) = found(sharp, every=every)
    assert (finding.kind, finding.severity, finding.status) == ("saturated-attention", "warning", "at-risk")
    assert (finding.layer, finding.head) == (None, None)
    assert finding.raised_step is not None
    assert finding.first_step < finding.raised_step <= 20
    assert finding.active
    assert "initial weights" in finding.advice


def test_the_finding_gives_its_numbers_beside_what_is_healthy() -> None:
    (finding,) = found(sharp)
    assert finding.evidence["median_entropy_frac"] == 0.02
    assert 150.0 <= finding.evidence["median_max_logit"] <= 152.0
    assert finding.evidence["loss_first"] == pytest.approx(4.6, abs=0.1)
    assert (
        finding.evidence["best_loss_median_healthy"] == f"below {0.85 * finding.evidence['loss_first']:.3g}"
    )
    assert finding.evidence["median_entropy_frac_healthy"].startswith("above 0.1 ")
    (lower,) = told(block_of(sharp, 200, every=5), band=Band({"plain": 2.0}))[0]
    assert lower.evidence["median_entropy_frac_healthy"].startswith("above 0.05 ")
    for name in finding.evidence:
        assert name.removesuffix("_healthy") in finding.evidence
    assert json.loads(json.dumps(finding.to_dict(), allow_nan=False)) == finding.to_dict()


def test_the_same_start_is_cleared_once_the_loss_has_fallen() -> None:
    def late(step: int) -> float:
        return stuck(step) if step < 60 else 4.6 * float(np.exp(-(step - 60) / 60))

    (finding,) = found(lambda step: sharp(step, late))
    assert finding.last_step is not None
    # 15 % have gone after ten steps; the level is a median of twenty losses, and three frames have to agree.
    assert 70 <= finding.last_step <= 100


def test_the_same_start_in_a_model_that_learns_at_once_is_none_or_cleared() -> None:
    assert found(lambda step: sharp(step, lambda s: 4.6 * float(np.exp(-s / 20)))) == []
    assert all(not finding.active for finding in found(lambda step: sharp(step, learning)))


def test_a_loss_that_came_down_and_rose_again_is_for_others_to_tell() -> None:
    def risen(step: int) -> float:
        return 4.6 * float(np.exp(-step / 20)) if step < 100 else 4.6

    assert found(lambda step: sharp(step, risen)) == []


@pytest.mark.parametrize("loss", [learning, lambda step: 0.7 * float(np.exp(-step / 40))])
def test_sharp_heads_of_a_trained_model_whose_loss_still_falls_are_none_in_the_end(
    loss: Callable[[int], float],
) -> None:
    def trained(step: int) -> dict[str, Any]:
        """Six of eight heads rest on the first token, as in a model that is trained further."""
        return {**only(6, lambda s: sharp(s, loss))(step), "rank_frac": 0.05, "sec_1": 0.95}

    assert all(not finding.active for finding in found(trained))
    scores = told(block_of(trained, 200, every=5))[1]
    assert scores[8:40] == [0.0] * 32


def test_heads_that_become_sharp_after_the_loss_has_fallen_are_none() -> None:
    def later(step: int) -> dict[str, Any]:
        wide = {"entropy_frac": 0.9, "max_logit": 3.0}
        return sharp(step, learning) | (wide if step < 100 else {})

    assert found(later) == []


@pytest.mark.parametrize(
    "course",
    [
        only(3, sharp),
        lambda step: sharp(step) | {"entropy_frac": 0.15},
        lambda step: sharp(step) | {"max_logit": 15.0},
    ],
    ids=["fewer than half of the heads", "entropy of more than a tenth", "small logits: few keys to look at"],
)
def test_what_only_looks_like_saturation_is_none(course: Course) -> None:
    assert found(course) == []


def test_most_heads_are_enough() -> None:
    assert len(found(only(5, sharp))) == 1


def test_a_negative_loss_that_does_not_move_is_one_that_does_not_move() -> None:
    assert len(found(lambda step: sharp(step, lambda s: -2.0 + 0.01 * float(np.sin(s))))) == 1
    assert found(lambda step: sharp(step, lambda s: -2.0 - 0.2 * s)) == []


@pytest.mark.parametrize("name", ["loss", "entropy_frac", "max_logit"])
def test_without_one_of_its_numbers_nothing_is_judged(name: str) -> None:
    findings, scores = told(block_of(without(sharp, name), 100, every=5))
    assert findings == []
    assert set(scores) == {-1.0}


def test_it_is_not_judged_before_ten_losses_are_known() -> None:
    scores = told(block_of(sharp, 60, every=1))[1]
    assert set(scores[:9]) == {-1.0}
    assert min(scores[9:60]) > 1.0


def test_entropy_that_is_no_number_is_left_out_and_where_all_is_nothing_is_judged() -> None:
    def holed(step: int) -> dict[str, Any]:
        frac = np.where(np.arange(len(HEADS)) < 3, np.nan, 0.02)
        return sharp(step) | {"entropy_frac": np.full(len(HEADS), np.nan) if 50 <= step < 100 else frac}

    findings, scores = told(block_of(holed, 200, every=5))
    assert len(findings) == 1
    assert findings[0].active
    assert set(scores[10:20]) == {-1.0}
    assert min(scores[20:40]) > 1.0


def test_losses_that_are_no_numbers_are_no_sign_that_it_learns() -> None:
    def broken(step: int) -> float:
        return float("nan") if step % 4 == 0 else stuck(step)

    assert len(found(lambda step: sharp(step, broken))) == 1
    assert found(lambda step: sharp(step, lambda _: float("nan"))) == []


def test_entropy_of_nothing_at_all_gives_a_finite_score() -> None:
    scores = told(block_of(lambda step: sharp(step) | {"entropy_frac": 0.0}, 100, every=5))[1]
    assert max(scores) > 1.0
    assert np.isfinite(scores).all()


def drawn(seed: int) -> Block:
    """Heads and a loss that wander about the limits, with holes."""
    draw = np.random.default_rng(seed)
    period, falls_from = draw.uniform(60, 200), int(draw.integers(50, 350))

    def course(step: int) -> dict[str, Any]:
        noise = np.random.default_rng((seed, step))
        row: dict[str, Any] = {
            "loss": 5.0 + noise.normal(0, 0.2) - 0.01 * max(0, step - falls_from),
            "entropy_frac": 0.1 * np.exp(np.sin(6.3 * step / period) + noise.normal(0, 0.3, len(HEADS))),
            "max_logit": 40.0 * np.exp(0.5 * np.sin(step / 30) + noise.normal(0, 0.3, len(HEADS))),
        }
        for name in ("entropy_frac", "max_logit"):
            row[name] = np.where(noise.random(len(HEADS)) < 0.1, np.nan, row[name])
        if noise.random() < 0.1:
            del row["loss"]
        return {"loss": stuck(step)} if step % 90 < 20 else row

    return block_of(course, 400, every=int(draw.choice([1, 3, 10])))


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_same_is_found_bit_for_bit_however_the_run_is_cut(*, seed: int, saved: bool) -> None:
    block, draw = drawn(seed), np.random.default_rng(seed)
    whole = told(block)
    assert whole[0]
    some = [draw.integers(1, len(block), count).tolist() for count in (1, 5, 20)]
    for cuts in (range(1, len(block)), *some):
        cut = told(block, cuts, saved=saved)
        assert cut[1] == whole[1]
        assert [one.to_dict() for one in cut[0]] == [one.to_dict() for one in whole[0]]
