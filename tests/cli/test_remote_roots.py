"""The verbs on runs behind a URI, against a real S3-compatible server on this machine."""

import json
import socket
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, ObjectStore, point_at
from streamlit.testing.v1 import AppTest
from synthetic import write_run

from diagnostics.app.aside import ASIDE
from diagnostics.app.launch import dashboard_command
from diagnostics.store.read import open_run
from diagnostics.store.remote.folder import open_remote
from diagnostics.store.remote.spool import spool_of
from diagnostics.store.remote.upload import Uploader

ROOT = f"s3://{BUCKET}/team"
Command = Callable[..., Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with ObjectStore(tmp_path_factory.mktemp("server") / "log") as store:
        yield store


@pytest.fixture
def root(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Two runs: `good`, and `deep/bad`, which collapses."""
    point_at(server, tmp_path / "spools", monkeypatch)
    for name, collapse in (("good", False), ("deep/bad", True)):
        local = write_run(
            tmp_path / "written",
            name,
            collapse=collapse,
            status="collapsed" if collapse else "healthy",
            spool="/home/somebody/spool/x",
            host="the-trainer",
        )
        Uploader(local, open_remote(f"{ROOT}/{name}")).run(last=True)
    return ROOT


def test_list_shows_the_runs_below_a_uri(root: str, diagnostics: Command) -> None:
    ended = diagnostics("list", root, "--json")
    assert ended.code == 0
    rows = {row["name"]: row for row in json.loads(ended.out)["runs"]}
    assert {name: (row["status"], row["path"]) for name, row in rows.items()} == {
        "good": ("healthy", f"{ROOT}/good"),
        "deep/bad": ("collapsed", f"{ROOT}/deep/bad"),
    }


def test_report_judges_a_run_behind_a_uri_as_it_judges_the_directory(
    root: str, diagnostics: Command, tmp_path: Path
) -> None:
    far = diagnostics("report", f"{root}/deep/bad", "--json")
    near = diagnostics("report", tmp_path / "written" / "deep" / "bad", "--json")
    assert far.code == near.code == 1
    assert json.loads(far.out) == json.loads(near.out)


def test_report_judges_every_run_below_a_uri(root: str, diagnostics: Command) -> None:
    ended = diagnostics("report", root, "--json")
    assert ended.code == 1
    assert {each["run"]: each["status"] for each in json.loads(ended.out)["runs"]} == {
        "good": "healthy",
        "bad": "collapsed",
    }


def test_the_advice_of_a_report_can_be_pasted_with_the_uri(root: str, diagnostics: Command) -> None:
    ended = diagnostics("report", f"{root}/deep/bad")
    assert f"diagnostics control {root}/deep/bad " in ended.out


def test_watch_shows_a_run_behind_a_uri_to_its_end(root: str, diagnostics: Command) -> None:
    ended = diagnostics("watch", f"{root}/good")
    assert ended.code == 0
    assert "99" in ended.out


def test_export_writes_a_run_behind_a_uri_to_a_folder_here(
    root: str, diagnostics: Command, tmp_path: Path
) -> None:
    ended = diagnostics("export", f"{root}/good", "--to", "jsonl", "--out", tmp_path / "out")
    assert ended.code == 0
    lines = (tmp_path / "out" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(100))


def test_control_names_the_machine_and_the_directory_where_commands_are_read(
    root: str, diagnostics: Command
) -> None:
    ended = diagnostics("control", f"{root}/good", "status")
    assert ended.code == 2
    assert "the-trainer" in ended.err
    assert "diagnostics control /home/somebody/spool/x" in ended.err


def test_compact_elsewhere_names_the_machine_that_can(root: str, diagnostics: Command) -> None:
    ended = diagnostics("compact", f"{root}/good")
    assert ended.code == 2
    assert "the-trainer" in ended.err
    assert "/home/somebody/spool/x" in ended.err


def test_compact_where_it_was_recorded_merges_and_uploads(
    root: str, diagnostics: Command, tmp_path: Path
) -> None:
    uri = root.replace("/team", "/alone/fresh")
    spool = spool_of(uri)
    written = write_run(tmp_path, "fresh", host=socket.gethostname(), spool=str(spool))
    spool.parent.mkdir(parents=True)
    written.rename(spool)
    ended = diagnostics("compact", uri)
    assert ended.code == 0, ended.err
    assert "steps: 1 files" in ended.out
    assert open_run(uri).steps()["step"].tolist() == list(range(100))
    assert list(spool.rglob("part-*.parquet")) == []
    again = diagnostics("compact", uri)
    assert again.code == 0, again.err
    assert open_run(uri).steps()["step"].tolist() == list(range(100))


@pytest.mark.parametrize("verb", ["list", "report", "watch", "export", "compact", "control", "dashboard"])
def test_a_uri_that_leads_nowhere_is_one_line_and_exit_code_2(
    verb: str, root: str, diagnostics: Command, tmp_path: Path
) -> None:
    more = {"export": ("--to", "csv", "--out", tmp_path / "out"), "control": ("status",)}.get(verb, ())
    ended = diagnostics(verb, f"{root}/nothing", *more)
    assert ended.code == 2
    assert len(ended.err.strip().splitlines()) == 1
    assert f"{root}/nothing" in ended.err


def test_the_dashboard_shows_the_runs_below_a_uri_and_each_run(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = str(files("diagnostics.app") / "main.py")
    command = dashboard_command(root)
    assert command[-1] == root
    monkeypatch.setattr("sys.argv", [main, root])
    page = AppTest.from_file(main, default_timeout=60).run()
    assert not page.exception, page.exception
    assert sorted(page.dataframe[0].value["run"]) == ["deep/bad", "good"]
    page.query_params["run"] = "deep/bad"
    page.run()
    # What the page has done beside it must not outlive the server.
    ASIDE.wait(60.0)
    assert not page.exception, page.exception
    words = [str(one.value) for one in (*page.header, *page.subheader, *page.markdown)]
    assert any("deep/bad" in text for text in words)
