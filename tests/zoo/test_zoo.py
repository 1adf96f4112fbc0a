"""Every architecture of the zoo: sites, spectra and attention are exact, training is untouched, nothing stays.

A library that is missing is a failure in CI and a skip that says so elsewhere.
"""

import os
from pathlib import Path

import pandas as pd
import pytest
import torch
from zoo_case import Case, MissingLibraryError
from zoo_models import CASES
from zoo_run import (
    Recorded,
    attached,
    attention_error,
    differences,
    head_rows,
    largest_logit,
    one_step,
    record,
    spectra_error,
    surroundings,
    twins,
)

NAMES = [f"{case.library}: {case.name}" for case in CASES]

# The stored values are float32 (6e-8); the recorder's own arithmetic is float64.
SPECTRUM = 1e-4
# The model computes q and k in float32 over two layers, the reference in float64. Logits l of up to 30 then
# differ by some 1e-6 |l|, and an entropy by that times the spread of the logits: 30 * 30 * 1e-6, about 1e-3 nats.
NATS = 2e-3
LOGIT = 1e-3


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    try:
        chosen.build(0.0)
    except MissingLibraryError as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error))
    return chosen


@pytest.fixture(scope="module")
def recorded(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return record(case, tmp_path_factory.mktemp("zoo") / "run")


def test_every_site_is_found_under_its_module_path_and_nothing_else_is(recorded: Recorded) -> None:
    assert {site.name for site in recorded.sites} == set(recorded.expected)


def test_each_site_has_its_heads_and_flags(recorded: Recorded) -> None:
    found = {site.name: (site.heads, site.kv_heads, site.head_dim) for site in recorded.sites}
    assert found == {name: (len(h.wq), h.kv_heads, h.head_dim) for name, h in recorded.expected.items()}
    missing, wrong = {}, {}
    for site in recorded.sites:
        heads = recorded.expected[site.name]
        missing[site.name] = heads.flags - set(site.flags)
        wrong[site.name] = set(site.flags) - heads.flags - heads.arguable
    assert {name: flags for name, flags in missing.items() if flags} == {}
    assert {name: flags for name, flags in wrong.items() if flags} == {}


def test_what_is_no_softmax_attention_is_skipped_with_a_reason(case: Case, recorded: Recorded) -> None:
    if recorded.refused:
        assert not recorded.expected
        return
    assert set(case.skipped) <= set(recorded.sites.skipped)
    assert all(recorded.sites.skipped[name] for name in case.skipped)


def test_every_head_has_the_spectrum_of_its_own_product(recorded: Recorded) -> None:
    errors = {
        name: spectra_error(recorded, name) for name, heads in recorded.expected.items() if not heads.mixed
    }
    assert {name: error for name, error in errors.items() if not error < SPECTRUM} == {}


def test_a_site_without_one_product_has_no_spectra_and_says_why(recorded: Recorded) -> None:
    reasons = {site.name: site.reason for site in recorded.sites}
    for name, heads in recorded.expected.items():
        if heads.mixed:
            assert reasons.get(name)
            assert head_rows(recorded.spectra, name)["sigma1"].isna().all()


def test_every_head_has_the_entropy_and_logits_that_the_model_computed(recorded: Recorded) -> None:
    wrong = {}
    for name in recorded.expected:
        limits = {
            "entropy": NATS,
            "entropy_min": NATS,
            "max_logit": LOGIT * largest_logit(recorded, name),
            "rows": 0.5,
        }
        for column, limit in limits.items():
            error = attention_error(recorded, name, column)
            if not error < limit:
                wrong[name, column] = error
    assert wrong == {}


def test_no_fault_and_no_warning_of_the_recorder_is_met(recorded: Recorded) -> None:
    assert (recorded.faults, recorded.warned) == ((), ())


def test_no_other_rows_are_recorded_than_of_the_heads_of_the_sites(recorded: Recorded) -> None:
    one_row_each = {name: list(range(len(heads.wq))) for name, heads in recorded.expected.items()}
    spectra = {name: rows for name, rows in one_row_each.items() if not recorded.expected[name].mixed}
    assert {name: _heads(recorded.attention, name) for name in _layers(recorded.attention)} == one_row_each
    found = {name: _heads(recorded.spectra, name) for name in _layers(recorded.spectra)}
    assert {name: rows for name, rows in found.items() if name in spectra} == spectra
    assert set(found) <= set(one_row_each)


def _layers(frame: pd.DataFrame) -> set[str]:
    return set(frame["layer"]) if len(frame) else set()


def _heads(frame: pd.DataFrame, name: str) -> list[int]:
    return [int(head) for head in head_rows(frame, name)["head"]]


def test_training_is_the_same_to_the_bit_with_and_without(case: Case, tmp_path: Path) -> None:
    plain, watched = twins(case, tmp_path / "run")
    assert differences(plain, watched) == []


def test_after_close_model_torch_and_library_are_as_before(case: Case, tmp_path: Path) -> None:
    model = case.build(0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = surroundings(model, optimizer)
    recorder = attached(model, optimizer, tmp_path / "run")
    if recorder is not None:
        one_step(case, model, optimizer, recorder)
        recorder.close()
    assert surroundings(model, optimizer) == before
