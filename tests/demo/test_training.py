"""The demonstration itself, short: what it trains, that it can be repeated, and that it says what it measured."""

import shutil
from pathlib import Path

import pytest
import torch
from synthetic import write_run

from diagnostics import open_run
from diagnostics.demo.arms import ARMS, PEAK_LR, WARMUP_STEPS, learning_rate
from diagnostics.demo.main import run_demo
from diagnostics.demo.text import ByteBatches, standard_library_text
from diagnostics.demo.verdict import verdict
from diagnostics.errors import DiagnosticsError

SAMPLES = Path(__file__).resolve().parent.parent.parent / "sample_runs"


def test_the_arms_are_trained_from_the_same_weights_on_the_same_data(tmp_path: Path) -> None:
    runs = run_demo(tmp_path / "demo", steps=2, seed=5)
    assert [run.name for run in runs] == [arm.name for arm in ARMS]
    first_losses = {open_run(run).steps()["loss"].iloc[0] for run in runs}
    assert len(first_losses) == 1
    assert all(open_run(run).info["state"] == "finished" for run in runs)
    # Run again into the same place: earlier demonstration runs are replaced, and the numbers are the same.
    again = run_demo(tmp_path / "demo", steps=2, seed=5)
    assert {open_run(run).steps()["loss"].iloc[0] for run in again} == first_losses


def test_a_directory_that_is_no_run_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / ARMS[0].name).mkdir()
    (tmp_path / ARMS[0].name / "thesis.txt").write_text("years of work")
    with pytest.raises(DiagnosticsError, match="exists and is no run"):
        run_demo(tmp_path, steps=1)
    assert (tmp_path / ARMS[0].name / "thesis.txt").exists()


def test_batches_depend_on_the_seed_alone_and_leave_the_global_generator_alone() -> None:
    text = standard_library_text()
    before = torch.get_rng_state()
    first, second = (ByteBatches(text, batch_size=3, context=8, seed=1) for _ in range(2))
    inputs_bt, targets_bt = first.next()
    assert torch.equal(inputs_bt, second.next()[0])
    assert torch.equal(inputs_bt[:, 1:], targets_bt[:, :-1])
    assert torch.equal(torch.get_rng_state(), before)
    row = bytes(inputs_bt[0].tolist())
    assert row in text


def test_warmup_is_linear_to_the_peak_and_the_other_arms_start_there() -> None:
    warmup, *others = ARMS
    assert learning_rate(warmup, 0) == pytest.approx(PEAK_LR / WARMUP_STEPS)
    assert learning_rate(warmup, WARMUP_STEPS // 2 - 1) == pytest.approx(PEAK_LR / 2)
    assert learning_rate(warmup, WARMUP_STEPS) == PEAK_LR
    assert {learning_rate(arm, 0) for arm in others} == {PEAK_LR}


def test_the_verdict_on_the_sample_runs_names_their_losses() -> None:
    runs = [SAMPLES / arm.name for arm in ARMS]
    finals = [open_run(run).steps(["loss"])["loss"].to_numpy()[-20:].mean() for run in runs]
    behind, bound, rescue = verdict(runs)
    assert f"{finals[1]:.3f} instead of {finals[0]:.3f}" in behind
    gap = finals[1] - finals[0]
    assert f"{100 * (finals[1] - finals[2]) / gap:.0f} % of the gap to the reference closed" in bound
    assert f"{finals[3]:.3f}" in rescue
    if (finals[1] - finals[3]) / gap < 0.5:
        assert "did not bring the loss back" in " ".join(rescue.split())


def test_runs_too_short_to_differ_are_said_to_be(tmp_path: Path) -> None:
    runs = [write_run(tmp_path, arm.name, steps=30) for arm in ARMS]
    assert "did not fall behind" in verdict(runs)[0]
    shutil.rmtree(runs[0] / "steps")
    assert verdict(runs) == ["not every arm has a loss, so the arms cannot be compared"]
