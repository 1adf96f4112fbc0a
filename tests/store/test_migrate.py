"""Runs of an older release are read as if the current one had written them; newer ones are refused."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
from synthetic import manifest

from diagnostics.errors import NewerSchemaError
from diagnostics.store.format import SCHEMA_VERSION
from diagnostics.store.manifest import read_as_written, read_manifest
from diagnostics.store.migrate import STEPS, migrate
from diagnostics.store.read import open_run

SAMPLES = Path(__file__).resolve().parents[2] / "sample_runs"
OLD = {
    "schema_version": 1,
    "run_id": "20250101-120000-abcdef",
    "state": "crashed",
    "started_s": 1.0,
    "heartbeat_s": 9.0,
    "ended_s": 9.5,
    "error": "KeyError: 'x'",
    "pid": 7,
    "host": "node",
    "every": 10,
    "steps": 30,
    "config": {"lr": 0.1},
    "unheard_of": [1],
}


def test_there_is_a_step_from_every_older_version() -> None:
    assert sorted(STEPS) == list(range(1, SCHEMA_VERSION))


def test_a_manifest_of_version_1_becomes_one_attempt_and_loses_nothing() -> None:
    before = copy.deepcopy(OLD)
    assert migrate(OLD) == {
        **OLD,
        "schema_version": 2,
        "attempt": 1,
        "attempts": [
            {
                "attempt": 1,
                "first_step": None,
                "started_s": 1.0,
                "ended_s": 9.5,
                "state": "crashed",
                "error": "KeyError: 'x'",
                "pid": 7,
                "host": "node",
                "every": 10,
                "config": {"lr": 0.1},
            }
        ],
    }
    assert before == OLD


def test_a_manifest_of_the_current_version_stays_as_it_is() -> None:
    current = manifest("run", steps=3)
    assert migrate(current) == current


@pytest.mark.parametrize("version", [0, -1, True, "1", None, 1.0])
def test_a_version_that_never_was_is_no_run(version: object, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": version}))
    with pytest.raises(ValueError, match="has no integer schema_version"):
        read_manifest(tmp_path)


def test_a_newer_version_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(
        NewerSchemaError, match=rf"schema version {SCHEMA_VERSION + 1}.*upgrade training-diag"
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    "run_dir", sorted(path.parent for path in SAMPLES.glob("*/run.json")), ids=lambda path: path.name
)
def test_the_sample_runs_are_of_version_1_and_read_as_one_attempt_without_being_touched(
    run_dir: Path,
) -> None:
    before = hashlib.sha256((run_dir / "run.json").read_bytes()).hexdigest()
    assert read_as_written(run_dir)["schema_version"] == 1
    info = open_run(run_dir).info
    assert (info["schema_version"], info["attempt"]) == (SCHEMA_VERSION, 1)
    assert [attempt["state"] for attempt in info["attempts"]] == ["finished"]
    assert len(open_run(run_dir).steps()) == info["steps"] > 0
    assert hashlib.sha256((run_dir / "run.json").read_bytes()).hexdigest() == before
