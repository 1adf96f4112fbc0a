"""Every architecture of the zoo: sites, spectra and attention are exact, training is untouched, nothing stays."""

import os
from pathlib import Path

import pandas as pd
import pytest
from zoo_case import Case, MissingLibraryError, imported
from zoo_models import CASES
from zoo_run import (
    Recorded,
    attention_error,
    differences,
    head_rows,
    largest_logit,
    record,
    spectra_error,
    twins,
)

NAMES = [f"{case.library}: {case.name}" for case in CASES]

# The stored values are float32 (6e-8); the recorder's own arithmetic is float64.
SPECTRUM = 1e-4
# The model computes q and k in float32 over two layers, the reference in float64. Logits l of up to 30 then
# differ by some 1e-6 |l|, and an entropy by that times the spread of the logits: 30 * 30 * 1e-6, about 1e-3 nats.
NATS = 2e-3
LOGIT = 1e-3


def test_no_two_cases_share_a_name_and_there_are_enough_of_them() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert len(NAMES) >= 40


def test_a_missing_library_fails_in_ci_and_is_a_skip_that_says_so_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(MissingLibraryError, match="no_such_library is not installed") as missing:
        imported("no_such_library")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="no_such_library"):
        _leave_out(missing.value)
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="no_such_library"):
        _leave_out(missing.value)


def _leave_out(missing: MissingLibraryError) -> None:
    if os.environ.get("CI"):
        pytest.fail(str(missing))
    pytest.skip(str(missing))


@pytest.fixture(scope="module", params=CASES, ids=NAMES)
def case(request: pytest.FixtureRequest) -> Case:
    chosen: Case = request.param
    try:
        chosen.build(0.0)
    except MissingLibraryError as error:
        _leave_out(error)
    return chosen


@pytest.fixture(scope="module")
def recorded(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return record(case, tmp_path_factory.mktemp("zoo") / "run")


def test_every_site_is_found_under_its_module_path_and_nothing_else_is(recorded: Recorded) -> None:
    assert {site.name for site in recorded.sites} == set(recorded.expected)


def test_each_site_has_its_heads(recorded: Recorded) -> None:
    found = {site.name: (site.heads, site.kv_heads, site.head_dim) for site in recorded.sites}
    assert found == {name: (len(h.wq), h.kv_heads, h.head_dim) for name, h in recorded.expected.items()}


def test_each_site_has_its_flags_and_no_others(recorded: Recorded) -> None:
    wrong = {}
    flags = {site.name: set(site.flags) for site in recorded.sites}
    for name, heads in recorded.expected.items():
        missing, invented = (
            heads.flags - flags.get(name, set()),
            flags.get(name, set()) - heads.flags - heads.arguable,
        )
        if missing or invented:
            wrong[name] = {"missing": missing, "invented": invented}
    assert wrong == {}


def test_what_is_no_softmax_attention_is_skipped_with_a_reason(case: Case, recorded: Recorded) -> None:
    skipped = recorded.sites.skipped
    assert recorded.refused or set(case.skipped) <= set(skipped)
    assert all(skipped.values())
    assert not set(skipped) & set(recorded.expected)


def test_every_head_has_the_spectrum_of_its_own_product(recorded: Recorded) -> None:
    errors = {name: spectra_error(recorded, name) for name in recorded.single}
    assert {name: error for name, error in errors.items() if not error < SPECTRUM} == {}


def test_a_site_without_one_product_has_no_spectra_and_says_why(recorded: Recorded) -> None:
    unsaid = {site.name for site in recorded.sites if not site.reason} - set(recorded.single)
    guessed = (
        _layers(recorded.spectra.dropna(subset="sigma1")) - set(recorded.single)
        if len(recorded.spectra)
        else set()
    )
    assert (unsaid, guessed) == (set(), set())


def test_every_head_has_the_entropy_and_logits_that_the_model_computed(recorded: Recorded) -> None:
    wrong = {}
    for name in recorded.expected:
        logit = LOGIT * largest_logit(recorded, name)
        limits = {"entropy": NATS, "entropy_min": NATS, "entropy_frac": NATS, "max_logit": logit, "rows": 0.5}
        for column, limit in limits.items():
            error = attention_error(recorded, name, column)
            if not error < limit:
                wrong[name, column] = error
    assert wrong == {}


def test_each_head_has_one_row_and_nothing_else_has_any(recorded: Recorded) -> None:
    every = {name: list(range(len(heads.wq))) for name, heads in recorded.expected.items()}
    assert _heads(recorded.attention) == every
    spectra = _heads(recorded.spectra)
    assert {name: heads for name, heads in spectra.items() if name in recorded.single} == {
        name: every[name] for name in recorded.single
    }
    assert set(spectra) <= set(every)


def _layers(frame: pd.DataFrame) -> set[str]:
    return set(frame["layer"]) if len(frame) else set()


def _heads(frame: pd.DataFrame) -> dict[str, list[int]]:
    return {name: [int(head) for head in head_rows(frame, name)["head"]] for name in _layers(frame)}


def test_a_model_without_attention_is_told_so_and_any_other_is_recorded_in_silence(
    recorded: Recorded,
) -> None:
    assert recorded.faults == ()
    told = bool(recorded.refused or recorded.warned)
    if len(recorded.single) == len(recorded.expected):  # else a warning of what cannot be had is in order
        assert told == (not recorded.expected)


def test_training_is_the_same_to_the_bit_with_and_without(case: Case, tmp_path: Path) -> None:
    plain, watched = twins(case, tmp_path / "run")
    assert differences(plain, watched) == []


def test_after_close_model_torch_and_library_are_as_before(recorded: Recorded) -> None:
    assert recorded.left == []
