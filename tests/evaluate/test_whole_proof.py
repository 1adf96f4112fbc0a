"""The whole proof on a handful of drawn courses: it adds up, and a second run gives the same bytes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blocks import HEADS, block_of
from proof_courses import course

from diagnostics.detect.bands import bands_from, shipped_bands
from sample_runs.evaluate.bands import bands_document, write_bands
from sample_runs.evaluate.corpus import Course
from sample_runs.evaluate.goals import goals
from sample_runs.evaluate.proof import fitted_powers, proof
from sample_runs.evaluate.report import as_json, markdown
from sample_runs.evaluate.scores import detector_channels
from sample_runs.evaluate.sections import sections


def courses() -> list[Course]:
    """Three families of two healthy runs and one whose logits grow from step 100 on and whose loss turns at 240."""
    layers = sorted({layer for layer, _ in HEADS})
    found = []
    for number, family in enumerate(("gpt", "llama", "vit")):
        for seed, failing in enumerate((False, False, True)):
            rate = 0.04 + 0.005 * number if failing else 0.002 * seed

            def told(step: int, rate: float = rate, seed: int = seed) -> dict[str, float]:
                grown = float(np.exp(rate * max(0, step - 100)))
                turned = 0.05 * max(0, step - 240) if rate > 0.01 else 0.0
                return {
                    "loss": 3.0 * float(np.exp(-min(step, 240) / 300))
                    + 0.02 * float(np.sin(step + seed))
                    + turned,
                    "grad_norm": 1.0,
                    "adam_rms": 1.0,
                    "lr": 1e-3,
                    "max_logit": 4.0 * grown,
                    "entropy": max(3.0 / grown, 0.01),
                    "entropy_frac": max(0.8 / grown, 0.01),
                    "rank_frac": 0.5 / grown,
                    "sigma1": grown,
                    "sec_1": 1 - 0.5 / grown,
                    "ratio": 0.01,
                }

            found.append(
                course(
                    "crash" if failing else "healthy",
                    onset=240 if failing else None,
                    name=f"{family}-{seed}",
                    family=family,
                    block=block_of(told, 300, every=10),
                    about={"sites": [{"name": layer, "flags": []} for layer in layers]},
                )
            )
    return found


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """All figures of the drawn courses."""
    some = courses()
    return proof(some, detector_channels(some), lambda _: None)


def test_the_whole_proof_finds_planted_failures(document: dict[str, Any]) -> None:
    assert (document["held_out"]["hits"], document["held_out"]["failing"]) == (3, 3)
    assert document["held_out"]["false_episodes"] == 0
    assert document["held_out"]["quiet_steps"] == 6 * 300
    assert {row["what"] for row in document["ablation"]} == {"alone", "left out", "added"}
    words = {goal.words: goal.reached for goal in goals(document)}
    assert words["recall at least 0.9"]
    assert "3/3 = 1.00" in markdown(sections(document))


def test_a_second_run_gives_the_same_bytes_and_what_is_stored_gives_the_same_tables(
    document: dict[str, Any],
) -> None:
    some = courses()
    again = as_json(proof(some, detector_channels(some), lambda _: None))
    assert again == as_json(document)
    assert markdown(sections(json.loads(again))) == markdown(sections(document))


def test_fitted_bands_are_bands_with_healthy_quantiles(tmp_path: Path) -> None:
    some = courses()
    channels = detector_channels(some)
    document = bands_document(channels, some, fitted_powers(channels, some))
    write_bands(document, tmp_path / "bands.json")
    bands = bands_from(json.loads((tmp_path / "bands.json").read_text(encoding="utf-8"))["detectors"])
    assert set(bands) == set(shipped_bands())
    growth = bands["logit-growth"].healthy
    assert 0.0 <= growth["p50"] <= growth["p99"] <= growth["max"] < bands["logit-growth"].of("plain")


def test_goals_that_are_missed_are_said_to_be_missed() -> None:
    some = courses()
    blind = [replace(one, onset=90) if one.failing else one for one in some]
    document = proof(blind, detector_channels(blind), lambda _: None)
    found = {goal.words: goal.reached for goal in goals(document)}
    assert not found["recall at least 0.9"]
    assert not found["median lead at least 50 steps"]


@pytest.mark.parametrize("name", ["held_out", "shipped", "in_sample", "half_as_often"])
def test_every_figure_lies_within_its_interval(name: str, document: dict[str, Any]) -> None:
    figures = document[name]
    assert figures["recall_interval"][0] <= figures["recall"] <= figures["recall_interval"][1]
    low, high = figures["false_per_1000_interval"]
    assert low <= figures["false_per_1000"] <= high
