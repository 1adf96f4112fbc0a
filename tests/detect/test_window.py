"""The window gives the same numbers whatever the blocks, and they are those of a slow derivation."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from blocks import HEADS, block_of, in_parts
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics.detect import exact
from diagnostics.detect.block import Block
from diagnostics.detect.history import History
from diagnostics.detect.window import Window

STEPS = 700
EVERY = 5


def course(step: int) -> dict[str, Any]:
    """Numbers without a pattern, with holes: losses missing or not finite, heads not observed."""
    draw = np.random.default_rng(step)
    values = draw.uniform(0.1, 9.0, len(HEADS))
    values[draw.random(len(HEADS)) < 0.1] = np.nan
    told: dict[str, Any] = {"max_logit": values, "ratio": draw.uniform(0, 1, 2), "lr": 1e-3 * (1 + step % 7)}
    if step % 3:
        told["loss"] = float(draw.normal(5 - step / 200, 0.5)) if step % 11 else float("nan")
    if 300 <= step < 340:
        del told["max_logit"]
    return told


BLOCK = block_of(course, STEPS, every=EVERY)
DERIVED: dict[str, Callable[[Window], Any]] = {
    "growth": lambda w: w.growth("max_logit", 1.0),
    "growth over 200": lambda w: w.growth("max_logit", over=200),
    "past": lambda w: w.past("ratio", 8),
    "mean": lambda w: exact.mean(w.now("max_logit")),
    "median": lambda w: exact.median(w.past("ratio", 8).transpose(0, 2, 1)),
    "loss median": lambda w: w.loss.median,
    "loss spread": lambda w: w.loss.spread,
    "best": lambda w: w.loss.best,
    "best step": lambda w: w.loss.best_step,
    "first": lambda w: w.loss.first,
    "change": lambda w: w.loss.change,
    "falling": lambda w: w.loss.falling,
    "losses before": lambda w: w.loss.per_step.before(128),
    "lr": lambda w: w.lr.last(),
    "age": lambda w: w.age,
}


def derived(blocks: list[Block], *, saved: bool = False) -> dict[str, Any]:
    """Everything that is derived, joined over the blocks; `saved`: through a state dict between any two."""
    history = History()
    found: dict[str, list[Any]] = {name: [] for name in DERIVED}
    for block in blocks:
        if saved:
            state = json.loads(json.dumps(history.state_dict()))
            history = History()
            history.load_state_dict(state)
        window = history.window(block, {})
        for name, derive in DERIVED.items():
            found[name].append(np.array(derive(window)))
    return {name: np.concatenate(values) for name, values in found.items()}


WHOLE = derived([BLOCK])


@settings(deadline=None, max_examples=25)
@given(cuts=st.lists(st.integers(1, len(BLOCK) - 1), max_size=12), saved=st.booleans())
def test_the_numbers_are_the_same_bit_for_bit_however_the_run_is_cut(*, cuts: list[int], saved: bool) -> None:
    cut = derived(in_parts(BLOCK, cuts), saved=saved)
    for name, values in WHOLE.items():
        np.testing.assert_array_equal(cut[name], values, err_msg=name)


def test_frame_by_frame_they_are_the_same_too() -> None:
    cut = derived(in_parts(BLOCK, list(range(len(BLOCK)))))
    for name, values in WHOLE.items():
        np.testing.assert_array_equal(cut[name], values, err_msg=name)


def test_growth_is_the_logarithm_against_the_oldest_frame_within_50_steps() -> None:
    for frame in (0, 3, 10, 59, 64, 139):
        step = frame * EVERY
        told = course(step) if step < STEPS and step % EVERY == 0 else {}
        before = course(max(0, step - 50)) if step else {}
        now, then = (np.asarray(one.get("max_logit", np.nan)) * np.ones(len(HEADS)) for one in (told, before))
        expected = np.log(np.maximum(now, 1.0)) - np.log(np.maximum(then, 1.0))
        np.testing.assert_allclose(WHOLE["growth"][frame], expected, rtol=1e-12)


def test_growth_of_frames_further_apart_than_50_steps_is_scaled_down_to_50() -> None:
    coarse = block_of(lambda step: {"max_logit": np.exp(step / 100)}, 1001, every=200)
    window = History().window(coarse, {})
    np.testing.assert_allclose(window.growth("max_logit")[1:5], 0.5, rtol=1e-12)


def test_the_loss_is_judged_by_the_finite_ones_that_were_handed_in() -> None:
    losses: list[float] = []
    best, best_step = np.inf, -1
    for frame, step in enumerate(BLOCK.steps):
        begin = BLOCK.ends[frame - 1] if frame else 0
        for at in range(begin, BLOCK.ends[frame]):
            told = course(at)
            if "loss" in told and np.isfinite(told["loss"]):
                losses.append(told["loss"])
        if len(losses) < 10:
            assert np.isnan(WHOLE["loss median"][frame])
            continue
        median = float(np.median(losses[-20:]))
        assert WHOLE["loss median"][frame] == median
        if median < best:
            best, best_step = median, step
        assert (WHOLE["best"][frame], WHOLE["best step"][frame]) == (best, best_step)
        assert WHOLE["first"][frame] == np.median(losses[:5])


def test_heads_that_appear_later_were_nothing_before() -> None:
    early = block_of(lambda _: {"max_logit": 2.0}, 100, heads=HEADS[4:])
    late = block_of(lambda _: {"max_logit": 4.0}, 200, heads=HEADS).part(10, 20)
    history = History()
    history.window(early, {})
    window = history.window(late, {})
    assert window.heads == HEADS
    growth = window.growth("max_logit")[0]
    assert np.isnan(growth[:4]).all()
    np.testing.assert_allclose(growth[4:], np.log(2.0))


def test_flags_are_those_of_the_heads_site() -> None:
    window: Window = History().window(BLOCK, {"blocks.1.attn": frozenset({"qk_norm"})})
    assert window.flag("qk_norm").tolist() == [False] * 4 + [True] * 4
    assert set(window.groups()) == {"plain", "qk_norm"}


@pytest.mark.parametrize("known", [0, 1, 2, 5, 8])
def test_medians_and_means_leave_out_what_is_not_known(known: int) -> None:
    values = np.full((3, 8), np.nan)
    values[:, np.random.default_rng(known).permutation(8)[:known]] = np.random.default_rng(1).normal(
        size=(3, known)
    )
    if not known:
        assert np.isnan(exact.median(values)).all()
        assert np.isnan(exact.mean(values)).all()
        assert np.isnan(exact.largest(values)).all()
        return
    np.testing.assert_allclose(exact.median(values), np.nanmedian(values, axis=1), rtol=1e-15)
    np.testing.assert_allclose(exact.mean(values), np.nanmean(values, axis=1), rtol=1e-14)
    np.testing.assert_array_equal(exact.largest(values), np.nanmax(values, axis=1))
