"""A list of runs costs one look at each run.json, and what takes longer is done beside the page."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from big_runs import write_runs
from synthetic import manifest, write_run

from diagnostics.app import browser, listing
from diagnostics.app.aside import Aside
from diagnostics.app.digest import Digest, digest_of
from diagnostics.app.listing import Listing, run_names
from diagnostics.store.manifest import write_manifest
from diagnostics.store.place import Place
from diagnostics.store.read import open_run


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs whose run.json was read."""
    seen: list[str] = []
    whole = listing.read_manifest

    def counted(run_dir: Place) -> Any:
        seen.append(run_dir.name)
        return whole(run_dir)

    monkeypatch.setattr(listing, "read_manifest", counted)
    return seen


def test_only_the_run_json_that_changed_is_read_again(tmp_path: Path, read: list[str]) -> None:
    write_runs(tmp_path, 20, layers=1, heads=1, tables=False)
    runs = Listing()
    assert len(runs.runs(tmp_path)) == 20
    assert len(read) == 20
    runs.runs(tmp_path)
    assert len(read) == 20
    write_manifest(tmp_path / "run-00007", manifest("run-00007", steps=5000))
    steps = {one.name: one.info["steps"] for one in runs.runs(tmp_path)}
    assert read[20:] == ["run-00007"]
    assert steps["run-00007"] == 5000


def test_a_process_that_dies_shows_without_a_new_run_json(tmp_path: Path, read: list[str]) -> None:
    write_run(tmp_path, "live", state="running", steps=0)
    runs = Listing()
    (one,) = runs.runs(tmp_path)
    assert one.info["state"] == "running"
    # Who stops to beat on another host has died or hangs.
    write_manifest(
        tmp_path / "live",
        manifest("live", state="running", host="elsewhere", heartbeat_s=time.time() - 29.5),
    )
    (one,) = runs.runs(tmp_path)
    count = len(read)
    assert one.info["state"] == "running"
    deadline_s = time.monotonic() + 20
    while one.info["state"] == "running" and time.monotonic() < deadline_s:
        time.sleep(0.1)
        (one,) = runs.runs(tmp_path)
    assert one.info["state"] == "crashed"
    assert len(read) == count


def test_an_unreadable_run_is_named_and_a_vanished_one_is_not_listed(tmp_path: Path) -> None:
    write_run(tmp_path, "good", steps=0)
    bad = write_run(tmp_path, "bad", steps=0)
    (bad / "run.json").write_text("{half")
    runs = Listing()
    by_name = {one.name: one.problem for one in runs.runs(tmp_path)}
    assert by_name["good"] is None
    assert "cannot be read" in str(by_name["bad"])
    shutil.rmtree(bad)
    assert [one.name for one in runs.runs(tmp_path)] == ["good"]


def test_runs_are_called_by_their_path_below_the_root(tmp_path: Path) -> None:
    write_run(tmp_path, "a", steps=0)
    write_run(tmp_path / "deep", "b", steps=0)
    assert run_names(tmp_path) == {"a": str(tmp_path / "a"), "deep/b": str(tmp_path / "deep" / "b")}
    assert run_names(tmp_path / "a") == {"a": str(tmp_path / "a")}
    assert run_names(f"file://{tmp_path}") == run_names(tmp_path)


def test_a_thousand_runs_are_shown_from_their_run_json_alone(tmp_path: Path) -> None:
    write_runs(tmp_path, 1000, layers=1, heads=1, tables=False)
    aside = Aside()
    rows = browser.run_rows(str(tmp_path), Listing(), aside)
    assert len(rows) == 1000
    # No run was read for its summary: it has one.
    assert aside.result(("digest", str(tmp_path / "run-00000"))) is None
    assert all(row["last loss"] is not None and row["status"] != browser.PENDING for row in rows)
    # The 200 that run come first, the youngest of them first.
    assert [row["run"] for row in rows[:3]] == ["run-00007", "run-00009", "run-00017"]
    by_name = {row["run"]: row for row in rows}
    assert by_name["run-00010"]["last loss"] == pytest.approx(2 + 10 / 97)
    assert by_name["run-00009"]["attempt"] == 2


def test_a_run_without_a_summary_is_read_beside_the_page(tmp_path: Path) -> None:
    run = write_run(tmp_path, "old", collapse=True)
    aside = Aside()
    (row,) = browser.run_rows(str(tmp_path), Listing(), aside)
    assert (row["status"], row["lowest entropy"]) == (browser.PENDING, None)
    aside.wait(30)
    (row,) = browser.run_rows(str(tmp_path), Listing(), aside)
    # Of 100 steps, step 90 is the last measured one; from 30 % on entropy falls linearly from 3.52 by 3.5.
    assert row["lowest entropy"] == pytest.approx(3.52 - 3.5 * (90 / 99 - 0.3) / 0.7)
    assert row["last loss"] == open_run(run).steps()["loss"].iloc[-1]
    assert row["highest mean SEC"] == pytest.approx(open_run(run).spectra()["sec_1"].max())


def test_a_run_whose_detectors_were_off_is_judged_beside_the_page(tmp_path: Path) -> None:
    summary = {"last_loss": 1.5, "lowest_entropy": 0.25, "highest_sec": None, "last_measured_step": 90}
    write_run(tmp_path, "silent", status=None, summary=summary)
    aside = Aside()
    (row,) = browser.run_rows(str(tmp_path), Listing(), aside)
    assert (row["status"], row["last loss"], row["highest mean SEC"]) == (browser.PENDING, 1.5, None)
    aside.wait(30)
    assert browser.run_rows(str(tmp_path), Listing(), aside)[0]["status"] == "healthy"


def test_a_digest_says_why_there_is_none(tmp_path: Path) -> None:
    assert "is not a directory" in str(digest_of(str(tmp_path / "nothing")))


def test_a_summary_with_a_nan_loss_is_shown_as_it_is() -> None:
    # JSON has no NaN; the writer spells it as a string.
    digest = Digest.recorded({"status": "diverged", "summary": {"last_loss": "nan"}})
    assert digest is not None
    assert digest.last_loss != digest.last_loss
    assert digest.lowest_entropy is None


def test_work_beside_the_page_is_done_once_per_stamp_and_the_newest_first() -> None:
    aside = Aside()
    begun, go_on = threading.Event(), threading.Event()
    done: list[str] = []

    def job(name: str) -> str:
        done.append(name)
        begun.set()
        go_on.wait(20)
        return name.upper()

    aside.ask("first", 1, lambda: job("first"))
    assert begun.wait(20)
    for name in ("second", "third"):
        aside.ask(name, 1, lambda name=name: job(name))
    go_on.set()
    aside.wait(20)
    assert done == ["first", "third", "second"]
    assert aside.result("third") == "THIRD"
    aside.ask("third", 1, lambda: job("third"))
    aside.wait(20)
    assert done == ["first", "third", "second"]
    assert aside.result("never asked for") is None


def test_runs_behind_a_file_uri_are_listed_like_those_behind_their_path(tmp_path: Path) -> None:
    write_run(tmp_path, "one", steps=0)
    (by_path,), (by_uri,) = Listing().runs(tmp_path), Listing().runs(f"file://{tmp_path}")
    assert by_path == by_uri
    assert Path(by_uri.run).samefile(tmp_path / "one")
