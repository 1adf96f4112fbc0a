import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from big_runs import write_runs
from synthetic import manifest, write_run

Command = Callable[..., Any]


def test_each_run_is_listed_with_name_state_steps_and_status(diagnostics: Command, tmp_path: Path) -> None:
    write_run(tmp_path, "ended", steps=100)
    write_run(tmp_path, "deep/live", steps=40, state="running", status="at-risk")
    write_run(tmp_path, "lost", steps=20, state="running", heartbeat_s=0.0, host="elsewhere")
    ended = diagnostics("list", tmp_path, "--json")
    assert (ended.code, ended.err) == (0, "")
    assert json.loads(ended.out) == {
        "runs": [
            {
                "name": "deep/live",
                "state": "running",
                "steps": 40,
                "status": "at-risk",
                "path": f"{tmp_path}/deep/live",
            },
            {
                "name": "ended",
                "state": "finished",
                "steps": 100,
                "status": "healthy",
                "path": f"{tmp_path}/ended",
            },
            {
                "name": "lost",
                "state": "crashed",
                "steps": 20,
                "status": "healthy",
                "path": f"{tmp_path}/lost",
            },
        ]
    }


def test_a_run_that_was_resumed_says_its_attempt(diagnostics: Command, tmp_path: Path) -> None:
    write_run(tmp_path, "again", state="crashed", attempt=2)
    (run,) = json.loads(diagnostics("list", tmp_path, "--json").out)["runs"]
    assert run["state"] == "crashed"
    assert "crashed, attempt 2" in diagnostics("list", tmp_path).out


def test_a_thousand_runs_are_listed_from_their_run_json_alone(diagnostics: Command, tmp_path: Path) -> None:
    # Whoever opened a table would meet none.
    write_runs(tmp_path, 1000, layers=1, heads=1, tables=False)
    rows = json.loads(diagnostics("list", tmp_path, "--json").out)["runs"]
    assert len(rows) == 1000
    assert {row["state"] for row in rows} == {"finished", "running", "crashed"}
    assert {row["status"] for row in rows} == {"healthy", "at-risk", "collapsed", "diverged"}


def test_people_get_a_table_that_cuts_no_name_short_in_a_pipe(diagnostics: Command, tmp_path: Path) -> None:
    name = "a-long-name-" * 12
    write_run(tmp_path, name)
    ended = diagnostics("list", tmp_path)
    (line,) = (line for line in ended.out.splitlines() if name in line)
    assert line.split() == [name, "finished", "100", "healthy"]


def test_a_listing_judges_nothing_but_reports_what_the_live_detectors_said(
    diagnostics: Command, tmp_path: Path
) -> None:
    write_run(tmp_path, steps=100, status="collapsed")
    ended = diagnostics("list", tmp_path, "--json")
    assert (ended.code, json.loads(ended.out)["runs"][0]["status"]) == (0, "collapsed")


@pytest.mark.parametrize("recorded", [None, "no-data"])
def test_a_run_recorded_without_detectors_is_judged_from_its_tables(
    diagnostics: Command, tmp_path: Path, recorded: str | None
) -> None:
    write_run(tmp_path, status=recorded)
    assert json.loads(diagnostics("list", tmp_path, "--json").out)["runs"][0]["status"] == "healthy"


def test_a_root_without_runs_gives_an_empty_list_and_says_what_makes_one(
    diagnostics: Command, tmp_path: Path
) -> None:
    ended = diagnostics("list", tmp_path, "--json")
    assert (ended.code, json.loads(ended.out)) == (0, {"runs": []})
    assert "diagnostics demo" in diagnostics("list", tmp_path).err


def test_a_root_that_is_no_directory_gives_2(diagnostics: Command, tmp_path: Path) -> None:
    ended = diagnostics("list", tmp_path / "nowhere")
    assert (ended.code, ended.out) == (2, "")
    assert "nowhere is not a directory" in ended.err


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": "one"}', '{"schema_version": 999}'])
def test_a_run_that_cannot_be_read_is_named_and_the_others_are_listed(
    diagnostics: Command, tmp_path: Path, content: str
) -> None:
    write_run(tmp_path, "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "run.json").write_text(content)
    ended = diagnostics("list", tmp_path, "--json")
    assert ended.code == 2
    assert [run["name"] for run in json.loads(ended.out)["runs"]] == ["good"]
    assert str(tmp_path / "bad" / "run.json") in ended.err


def test_a_manifest_without_a_step_count_shows_null_not_zero(diagnostics: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=20)
    content = manifest("run")
    del content["steps"]
    (run / "run.json").write_text(json.dumps(content))
    assert json.loads(diagnostics("list", tmp_path, "--json").out)["runs"][0]["steps"] is None
    assert "unknown" in diagnostics("list", tmp_path).out
