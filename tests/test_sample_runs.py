"""The runs that come with the repository: readable by everyday tools, small, and judged as they were when made."""

import json
from pathlib import Path

import pandas as pd
import pytest

from diagnostics import assess, open_run
from diagnostics.store.format import SCHEMAS

SAMPLES = Path(__file__).parent.parent / "sample_runs"
EXPECTED = json.loads((SAMPLES / "expected.json").read_text(encoding="utf-8"))
NAMES = ("gpt-warmup", "gpt-no-warmup", "gpt-no-warmup-bound", "gpt-rescued")


def test_the_four_arms_are_there() -> None:
    assert tuple(EXPECTED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_judged_as_written_beside_it(name: str) -> None:
    report = assess(SAMPLES / name)
    found = [finding.to_dict() for finding in report.findings]
    assert report.status == EXPECTED[name]["status"]
    assert [
        {key: f[key] for key in expected}
        for f, expected in zip(found, EXPECTED[name]["findings"], strict=True)
    ] == (EXPECTED[name]["findings"])


def test_the_failing_arm_is_flagged_and_the_healthy_and_the_bounded_are_not() -> None:
    statuses = {name: assess(SAMPLES / name).status for name in NAMES}
    assert statuses["gpt-no-warmup"] == "collapsed"
    assert statuses["gpt-warmup"] == statuses["gpt-no-warmup-bound"] == "healthy"


def test_spectral_energy_concentrates_ahead_of_the_collapse_of_entropy() -> None:
    findings = {finding.kind: finding for finding in assess(SAMPLES / "gpt-no-warmup").findings}
    assert findings["spectral-concentration"].first_step < findings["entropy-collapse"].first_step


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_small_and_plain_pandas_reads_it(name: str) -> None:
    run_dir = SAMPLES / name
    assert sum(path.stat().st_size for path in run_dir.rglob("*") if path.is_file()) < 400_000
    for table in SCHEMAS:
        if not list((run_dir / table).glob("*.parquet")):
            assert table == "events", "a healthy run may have no events, but it has every measurement"
            assert len(open_run(run_dir).events()) == 0
            continue
        frame = pd.read_parquet(run_dir / table)
        assert list(frame.columns)[: len(SCHEMAS[table].names)] == SCHEMAS[table].names
        assert len(frame) == len(open_run(run_dir).table(table))
