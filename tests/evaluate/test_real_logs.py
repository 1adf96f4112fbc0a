"""Logged runs: their labels from the loss alone, how alarms on them are scored, and how edges are frozen."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from diagnostics.errors import DiagnosticsError
from sample_runs.evaluate.machine import Values
from sample_runs.evaluate.real_logs import load_logs, real_logs_document, real_logs_section, submission_of
from sample_runs.evaluate.real_logs_label import Label, label_of
from sample_runs.evaluate.real_logs_score import Log, Rule, at_or_above, figures, frozen_on_others


def course(points: int = 600, noise: float = 0.03, seed: int = 0) -> Values:
    """Falls from 6 to 1 with a scale of 40 points."""
    rng = np.random.default_rng(seed)
    losses: Values = 1.0 + 5.0 * np.exp(-np.arange(points) / 40) + rng.normal(0, noise, points)
    return losses


def log(name: str, losses: Values, submission: str = "one") -> Log:
    return Log(name, submission, losses, np.ones(len(losses)), label_of(losses))


def test_a_rise_to_the_end_is_a_crash_from_its_first_loss_beyond_the_limit() -> None:
    losses = course()
    losses[500:] += 1.0
    assert label_of(losses) == Label("crash", 500)


def test_a_crash_is_one_too_if_the_run_recovers_after_a_tenth_of_its_length() -> None:
    losses = course()
    losses[300:380] += 1.0
    assert label_of(losses) == Label("crash", 300)


@pytest.mark.parametrize("lasts", [5, 12, 40])
def test_a_rise_that_heals_sooner_is_a_recovered_spike(lasts: int) -> None:
    losses = course()
    losses[300 : 300 + lasts] += 1.0
    assert label_of(losses) == Label("spike-recovered", 300)


def test_losses_that_are_no_numbers_count_as_high() -> None:
    losses = course()
    losses[500:] = np.nan
    assert label_of(losses) == Label("crash", 500)


def test_noise_beyond_the_limit_before_the_rise_is_not_its_onset() -> None:
    losses = course()
    losses[[480, 490, 495]] += 2.0
    losses[500:] += 1.0
    assert label_of(losses) == Label("crash", 500)


def test_two_kinds_of_batches_are_healthy() -> None:
    rng = np.random.default_rng(1)
    losses = course(2000) + np.where(rng.random(2000) < 0.45, rng.uniform(0.5, 2.5, 2000), 0.0)
    assert label_of(losses) == Label("healthy", None)


def test_a_loss_that_stays_near_its_start_was_never_learned() -> None:
    assert label_of(course(noise=0.01) * 0.01 + 6.9) == Label("never-learned", None)
    assert label_of(course()) == Label("healthy", None)


def test_alarms_before_and_soon_after_the_onset_are_told_apart() -> None:
    crashed = course()
    crashed[500:] += 1.0
    logs = [log("a", crashed), log("b", crashed), log("c", crashed), log("d", course())]
    found = figures(logs, {"a": [470], "b": [504], "c": [350, 515], "d": [10, 30, 200]})
    assert (found["failing"], found["before_onset"]) == (3, 1)
    assert (found["within_5_after"], found["within_20_after"]) == (2, 3)
    assert found["lead_median"] == 0.0
    assert (found["false_episodes"], found["points"]) == (2, 600)
    assert found["false_per_1000"] == pytest.approx(1000 * 2 / 600, abs=1e-4)
    assert (found["healthy"], found["healthy_alarmed"]) == (1, 1)


def test_an_edge_is_frozen_on_the_submissions_that_are_not_scored() -> None:
    signals = {"a": 2.0, "b": 30.0, "c": 0.6}
    logs = [log(name, course(), submission=name) for name in signals]
    rule = Rule("", at_or_above(lambda one: np.full(len(one.losses), signals[one.name])))
    alarms, edges = frozen_on_others(logs, rule)
    # The lowest edge of the lattice above the worst of the others' signals.
    assert 30.0 < edges["a"] <= 30.0 * 1.11
    assert 2.0 < edges["b"] <= 2.0 * 1.11
    assert edges["a"] == edges["c"]
    assert (len(alarms["a"]), len(alarms["b"]), len(alarms["c"])) == (0, 600, 0)


def test_a_submission_is_what_stands_above_its_studies() -> None:
    name = "algoperf_v05/logs/self_tuning/someone/study_3/wmt_jax/trial_1"
    assert submission_of(name) == "self_tuning/someone"


def written(path: Path, rows: list[dict[str, object]]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def test_the_detectors_notice_a_crash_in_a_file_of_logs(tmp_path: Path) -> None:
    crashed = course(seed=1)
    crashed[500:] += 1.0
    rows = [
        {
            "run": f"logs/tuning/{submission}/study_0/wmt/trial_{trial}",
            "loss": losses.tolist(),
            "grad_norm": [1.0] * 600,
        }
        for submission in ("one", "two")
        for trial, losses in enumerate((course(seed=2), course(seed=3), crashed))
    ]
    document = real_logs_document(written(tmp_path / "logs.jsonl.gz", rows))
    assert document is not None
    assert document["labels"] == {"crash": 2, "healthy": 4}
    assert (document["hits"], document["failing"], document["false_per_1000"]) == (2, 2, 0.0)
    assert json.loads(json.dumps(document)) == document
    section = real_logs_section(document)
    assert all(len(row) == len(section.header) for row in section.rows)


def test_without_the_file_the_figures_are_said_to_be_not_available(tmp_path: Path) -> None:
    assert load_logs(tmp_path / "none.jsonl.gz") == []
    assert real_logs_document(tmp_path / "none.jsonl.gz") is None
    assert "Not available" in real_logs_section(None).words


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"loss": [1.0], "grad_norm": [1.0]}, "run"),
        ({"run": "x", "loss": ["high"], "grad_norm": [1.0]}, "high"),
        ({"run": "x", "loss": [1.0, 2.0], "grad_norm": [1.0]}, "2 losses and 1 gradient norms"),
    ],
)
def test_a_line_that_is_no_run_is_told_with_its_number(
    tmp_path: Path, row: dict[str, object], told: str
) -> None:
    path = written(tmp_path / "logs.jsonl.gz", [row])
    with pytest.raises(DiagnosticsError, match=f"line 1: .*{told}"):
        load_logs(path)
