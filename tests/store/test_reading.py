"""Reading a run: ranges, columns, what is damaged, what is no run, and what state a manifest tells."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import HEADS, LAYERS, manifest, write_run, write_table

from diagnostics.errors import DamagedDataWarning, DiagnosticsError, NewerSchemaError, NotARunError
from diagnostics.store.format import MANIFEST, part_name, part_steps
from diagnostics.store.manifest import live_state, write_atomically
from diagnostics.store.read import find_runs, open_run
from diagnostics.store.write import PartWriter


def test_ranges_are_inclusive_and_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, steps=50, every=10))
    assert list(run.steps(start_step=7, end_step=9)["step"]) == [7, 8, 9]
    frame = run.attention(["entropy", "layer"], start_step=20, end_step=30)
    assert list(frame.columns) == ["entropy", "layer"]
    assert len(frame) == 2 * len(LAYERS) * HEADS
    assert run.steps(start_step=1000).empty


def test_a_part_outside_the_range_is_not_even_opened(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=10)
    (run_dir / "steps" / part_name(100, 200, 9)).write_bytes(b"not parquet")
    assert len(open_run(run_dir).steps(end_step=50)) == 10
    with pytest.warns(DamagedDataWarning):
        open_run(run_dir).steps()


def test_what_is_asked_for_wrongly_is_refused_in_words(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path))
    with pytest.raises(
        DiagnosticsError, match="table 'steps' has no column 'los'; it has step, time_s, loss"
    ):
        run.steps(["los"])
    with pytest.raises(DiagnosticsError, match=r"columns=\[\] asks for nothing"):
        run.steps([])
    with pytest.raises(DiagnosticsError, match="there is no table 'loss'; the tables are steps, attention"):
        run.table("loss")


def test_files_that_no_recorder_wrote_are_named_and_skipped(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=10)
    (run_dir / "steps" / "extra.parquet").write_bytes(b"")
    (run_dir / "steps" / ".part-000000000010-000000000011-000001.parquet.tmp").write_bytes(b"half")
    pq.write_table(pa.table({"loss": [1.0]}), run_dir / "steps" / part_name(10, 11, 1))
    run = open_run(run_dir)
    with pytest.warns(DamagedDataWarning) as caught:
        assert len(run.steps()) == 10
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 2
    assert any("extra.parquet" in m and "its name is not one" in m for m in messages)
    assert any("has no column 'step'" in m for m in messages)
    assert run.steps().shape[0] == 10  # told once


def test_a_scalar_that_came_late_is_null_before(tmp_path: Path) -> None:
    writer = PartWriter(write_run(tmp_path, steps=0))
    writer.add("steps", [{"step": 0, "loss": 1.0}])
    writer.flush()
    writer.add("steps", [{"step": 1, "loss": 2.0, "epoch": 3.0}])
    writer.flush()
    writer.add("steps", [{"step": 2, "loss": 2.0}])
    assert writer.pending == 1
    writer.flush()
    assert writer.pending == 0
    frame = open_run(tmp_path / "run").steps()
    assert frame["epoch"].isna().tolist() == [True, False, True]
    last = max((tmp_path / "run" / "steps").glob("*.parquet"))
    assert "epoch" in pq.read_schema(last).names


def test_a_part_that_cannot_be_written_keeps_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = write_run(tmp_path, steps=0)
    writer = PartWriter(run_dir)
    writer.add("steps", [{"step": 0, "loss": 1.0}])
    with monkeypatch.context() as patch:

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(pq, "write_table", full)
        with pytest.raises(OSError, match="No space left"):
            writer.flush()
    assert open_run(run_dir).steps().empty
    writer.flush()
    assert len(open_run(run_dir).steps()) == 1


def test_the_head_column_holds_nulls_as_integers(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=1)
    event: dict[str, Any] = {
        "step": 0,
        "time_s": 0.0,
        "kind": "warning",
        "severity": "info",
        "message": "",
        "data": "{}",
    }
    write_table(run_dir, "events", [{**event, "head": 1}, {**event, "head": None}])
    heads = open_run(run_dir).events()["head"]
    assert str(heads.dtype) == "Int16"
    assert heads[0] == 1
    assert pd.isna(heads[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no run.json, so it is no run"),
        ("", "cannot be read"),
        ("[]", "has no integer schema_version"),
        ('{"schema_version": "1"}', "has no integer schema_version"),
    ],
)
def test_a_path_that_is_no_run_is_refused_in_words(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(NotARunError, match=message):
        open_run(tmp_path)
    with pytest.raises(NotARunError, match="is not a directory; give the directory that a Recorder wrote to"):
        open_run(tmp_path / "nowhere")


def test_a_run_of_a_newer_release_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(manifest("run", schema_version=99)))
    with pytest.raises(NewerSchemaError, match="has schema version 99, this release reads up to 1; upgrade"):
        open_run(tmp_path)


def test_a_manifest_that_vanishes_leaves_the_last_good_one(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path))
    (run.path / MANIFEST).unlink()
    assert run.info["run_id"] == "run"
    assert MANIFEST in run.damaged


def test_runs_are_found_at_and_below_a_root_and_not_inside_runs(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_run(tmp_path, name)
    write_run(tmp_path / "deep" / "er", "c")
    write_run(tmp_path / "a", "inside")
    assert [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)] == ["a", "b", "deep/er/c"]
    assert find_runs(tmp_path / "a") == [tmp_path / "a"]
    with pytest.raises(NotARunError, match="is not a directory"):
        find_runs(tmp_path / "nowhere")


def ended_pid() -> int:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return child


NOW = time.time()
STATES: dict[str, tuple[dict[str, Any], str]] = {
    "said finished": ({"state": "finished"}, "finished"),
    "said crashed": ({"state": "crashed"}, "crashed"),
    "a word of its own": ({"state": "asleep"}, "crashed"),
    "alive": ({}, "running"),
    "dead here": ({"pid": "ended"}, "crashed"),
    "alive, heartbeat lost": ({"heartbeat_s": NOW - 60}, "stalled"),
    "elsewhere, beating": ({"host": "other"}, "running"),
    "elsewhere, heartbeat lost": ({"host": "other", "heartbeat_s": NOW - 60}, "crashed"),
    "steps overdue": ({"steps": 1000, "started_s": NOW - 1000, "last_step_s": NOW - 400}, "stalled"),
    "steps slow as ever": ({"steps": 100, "started_s": NOW - 1000, "last_step_s": NOW - 400}, "running"),
}


@pytest.mark.parametrize("case", STATES)
def test_the_state_is_judged_from_what_the_writer_said_its_process_and_its_heartbeat(case: str) -> None:
    changes, expected = STATES[case]
    given = {
        "state": "running",
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "heartbeat_s": NOW,
        **changes,
    }
    if given["pid"] == "ended":
        given["pid"] = ended_pid()
    assert live_state(given, now_s=NOW) == expected


def test_an_atomic_write_leaves_the_old_content_where_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def killed(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(OSError, match="Input/output"):
        write_atomically(path, "new")
    assert path.read_text() == "old"


def test_a_part_name_gives_its_steps_back_and_other_names_none() -> None:
    assert part_steps(part_name(3, 40, 7)) == (3, 40)
    for name in (
        "part-1-2.parquet",
        "part-a-b-c.parquet",
        ".part-1-2-3.parquet.tmp",
        "part-1-2-3.parquet.tmp",
        "x",
    ):
        assert part_steps(name) is None
