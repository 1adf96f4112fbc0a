"""Reading a run: ranges, columns, what is damaged, what is no run, and what state a manifest tells."""

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripted_writer import say
from synthetic import HEADS, LAYERS, PARAMETERS, manifest, write_run, write_table

from diagnostics.errors import DamagedDataWarning, DiagnosticsError, NewerSchemaError, NotARunError
from diagnostics.report import assess
from diagnostics.store.format import MANIFEST, TABLES, PartName, part_name, part_steps
from diagnostics.store.manifest import live_state, write_atomically
from diagnostics.store.place import LocalPlace
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
    assert not list((run_dir / "steps").glob("*"))
    assert list(open_run(run_dir).steps()["step"]) == [0]  # from the tail
    writer.flush()
    assert list(open_run(run_dir).steps()["step"]) == [0]
    assert not list((run_dir / "tail").glob("rows-*"))


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
    with pytest.raises(NewerSchemaError, match="has schema version 99, this release reads up to 2; upgrade"):
        open_run(tmp_path)


def test_a_manifest_that_vanishes_leaves_the_last_good_one(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path))
    (tmp_path / "run" / MANIFEST).unlink()
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


def merged_run(root: Path, heads: int = 8, steps: int = 8192) -> Path:
    """A run as merging leaves it: rows sorted by layer, head and step, in row groups of 16,384 rows."""
    run_dir = write_run(root, steps=0)
    rng = np.random.default_rng(0)
    count = len(LAYERS) * heads * steps
    table = pa.table(
        {
            "step": np.tile(np.arange(steps), len(LAYERS) * heads),
            "layer": np.repeat(LAYERS, heads * steps),
            "head": np.tile(np.repeat(np.arange(heads, dtype=np.int16), steps), len(LAYERS)),
            **{name: rng.random(count, np.float32) for name in ("entropy", "max_logit", "rank_frac")},
        }
    )
    (run_dir / "attention").mkdir()
    path: Path = run_dir / "attention" / str(PartName(0, steps - 1, 99, merges=1))
    pq.write_table(table, path, row_group_size=16_384, compression="zstd")
    return run_dir


class CountedFile(io.RawIOBase):
    """A file that counts the bytes that are read of it."""

    total = 0

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("rb")  # noqa: SIM115 - closed with this one

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        CountedFile.total += len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def test_one_heads_series_touches_a_small_part_of_a_merged_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = merged_run(tmp_path)
    run = open_run(run_dir)
    whole = run.attention()
    size = sum(path.stat().st_size for path in (run_dir / "attention").iterdir())
    monkeypatch.setattr(LocalPlace, "source", lambda place: CountedFile(str(place)))
    series = run.attention(["step", "entropy"], layer=LAYERS[1], head=3)
    chosen = whole[(whole["layer"] == LAYERS[1]) & (whole["head"] == 3)]
    assert series["entropy"].tolist() == chosen["entropy"].tolist()
    assert len(series) == 8192
    # One of eight row groups, the entropy among three metrics of random bits, the footer besides.
    assert 0 < CountedFile.total < size / 10
    CountedFile.total = 0
    assert len(run.attention(["max_logit"])) == len(whole)
    assert size / 4 < CountedFile.total < size / 2


def test_filters_choose_rows_and_say_where_they_cannot(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, steps=40, collapse=True))
    whole = run.attention()
    one = run.attention(layer=LAYERS[0], head=np.int64(1), start_step=10)  # type: ignore[arg-type]
    assert one.equals(
        whole[(whole["layer"] == LAYERS[0]) & (whole["head"] == 1) & (whole["step"] >= 10)].reset_index(
            drop=True
        )
    )
    assert set(run.updates(parameter=PARAMETERS[1])["parameter"]) == {PARAMETERS[1]}
    assert run.spectra(["sec_1"], layer="no such layer").columns.tolist() == ["sec_1"]
    assert run.spectra(layer="no such layer").empty
    assert run.attention(head=70_000).empty
    assert len(run.events(layer=LAYERS[0], head=1)) == 1
    with pytest.raises(
        DiagnosticsError, match="'steps' has no column 'layer', so layer='x' chooses nothing; attention"
    ):
        run.steps(layer="x")
    with pytest.raises(DiagnosticsError, match="'attention' has no column 'parameter'"):
        run.attention(parameter="x")
    with pytest.raises(DiagnosticsError, match="head='1' is no integer"):
        run.attention(head="1")  # type: ignore[arg-type]
    with pytest.raises(DiagnosticsError, match="layer=0 is no string"):
        run.attention(layer=0)  # type: ignore[arg-type]
    with pytest.raises(DiagnosticsError, match="columns='loss' is one word; give a list"):
        run.steps("loss")


def test_rows_of_a_file_in_any_order_come_in_step_order(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=30, every=3)
    expected = {name: open_run(run_dir).table(name) for name in ("attention", "updates")}
    for name, table in expected.items():
        path = next((run_dir / name).glob("*.parquet"))
        shuffled = np.random.default_rng(1).permutation(table.num_rows)
        pq.write_table(table.take(shuffled), path)
        assert open_run(run_dir).table(name).equals(table)


def test_a_column_that_only_other_files_have_is_null_and_costs_their_schemas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = write_run(tmp_path, steps=0)
    write_table(run_dir, "steps", [{"step": 0, "loss": 1.0}], 0)
    write_table(run_dir, "steps", [{"step": 1, "loss": 1.0, "epoch": 2.0}], 1)
    run = open_run(run_dir)
    frame = run.steps(["epoch", "step"], end_step=0)
    assert frame["epoch"].isna().tolist() == [True]
    assert frame["epoch"].dtype == np.float64

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("rows were read")

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", refuse)
    with pytest.raises(DiagnosticsError, match=r"no column 'epok'; it has step, .*, epoch$"):
        run.steps(["epok"], start_step=50)


def flip(path: Path) -> None:
    pq.write_table(pq.read_table(path), path, write_page_checksum=True, compression="none")
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)


def fill(path: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), path)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


KINDS: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("Moved to the other disk.\n"),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "folder": folder,
    "link to nowhere": lambda path: link(path, "nowhere"),
    "link to itself": lambda path: link(path, path.name),
    "other columns": lambda path: fill(path, a=[1]),
    "another table": lambda path: fill(
        path, step=[1], layer=["a"], head=pa.array([1], pa.int16()), parameter=["b"], other=[0.5]
    ),
    "other types": lambda path: fill(
        path, step=["x"], layer=[1], head=["y"], parameter=[2], loss=[1], data=[2]
    ),
    "a flipped bit": flip,
}


def damage(run_dir: Path, table: str, kind: str) -> str:
    """Puts a file that cannot be read into a table's folder; returns its name in the run."""
    (run_dir / table).mkdir(exist_ok=True)
    path = run_dir / table / part_name(0, 2000, 77)
    path.write_bytes(min((run_dir / "steps").glob("part-*")).read_bytes())
    KINDS[kind](path)
    return f"{table}/{path.name}"


@pytest.mark.parametrize("table", [*TABLES, "coarse/16/steps"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_be_read_is_named_and_the_rest_is_read(
    kind: str, table: str, tmp_path: Path
) -> None:
    run_dir = write_run(tmp_path, steps=50, collapse=True)
    intact = open_run(run_dir)
    (run_dir / "coarse" / "16").mkdir(parents=True)
    expected = intact.coarse("steps", 16) if "/" in table else intact.table(table)
    name = damage(run_dir, table, kind)
    run = open_run(run_dir)
    with pytest.warns(DamagedDataWarning) as caught:
        found = run.coarse("steps", 16) if "/" in table else run.table(table)
    assert found.equals(expected)
    assert list(run.damaged) == [name]
    assert len(caught) == 1
    assert str(run_dir / name) in str(caught[0].message)
    assert run.follow("steps" if "/" in table else table).read().rows.num_rows > 0
    assert len(run.damaged) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_report_says_that_data_is_missing(kind: str, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=50, collapse=True)
    expected = assess(run_dir)
    names = [damage(run_dir, table, kind) for table in ("steps", "attention")]
    with pytest.warns(DamagedDataWarning):
        report = assess(run_dir)
    assert report.status == expected.status
    told = set(report.missing) - set(expected.missing)
    assert len(told) == 2
    for name in names:
        assert any(sentence.startswith(f"data is missing: {name} is damaged") for sentence in told)


@pytest.mark.parametrize("name", ["steps", "tail", "attention", "coarse/16/steps", "coarse"])
def test_a_file_where_a_folder_belongs_is_named(name: str, tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=20)
    if (run_dir / name).exists():
        (run_dir / name).rename(tmp_path / "aside")
    (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
    (run_dir / name).write_text("in the way")
    run = open_run(run_dir)
    with pytest.warns(DamagedDataWarning):
        found, heads = run.coarse("steps", 16), run.attention()
    assert len(found) == (0 if name == "steps" else 2)
    assert heads.empty == (name == "attention")
    assert any(told.startswith(name) for told in run.damaged)


def test_damage_in_the_tail_is_named_and_the_rest_of_it_is_read(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=0)
    writer = PartWriter(run_dir)
    for step in range(4):
        writer.add("events", [{"step": step, "message": f"message {step}"}])
    log = next((run_dir / "tail").glob("rows-*"))
    content = log.read_bytes()
    (run_dir / "tail" / "notes.log").write_text("foreign")
    (run_dir / "tail" / "rows-000077.log").symlink_to("nowhere")
    (run_dir / "tail" / ".hidden.log").write_text("nobody's business")
    at = content.index(b"message 1")
    log.write_bytes(content[:at] + b"massage" + content[at + 7 :])
    run = open_run(run_dir)
    with pytest.warns(DamagedDataWarning):
        assert list(run.events()["step"]) == [0, 2, 3]
    assert set(run.damaged) == {f"tail/{log.name}", "tail/notes.log", "tail/rows-000077.log"}
    assert run.follow("events").read().rows.column("step").to_pylist() == [0, 2, 3]
    log.write_bytes(content[:-3])
    torn = open_run(run_dir)
    with pytest.warns(DamagedDataWarning):
        assert list(torn.events()["step"]) == [0, 1, 2]  # the last was never acknowledged
    assert set(torn.damaged) == {"tail/notes.log", "tail/rows-000077.log"}
    writer.close()


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from scripted_writer import ScriptedWriter, merge_some
writer, acknowledged = ScriptedWriter(Path(sys.argv[1]), every=4), Path(sys.argv[2])
with acknowledged.open("r+b", buffering=0) as file:
    for step in range(100_000):
        writer.step(step, measured=step % 4 == 0)
        file.seek(0)
        file.write(step.to_bytes(8, "little"))
        if step % 7 == 6:
            writer.flush()
        if step % 50 == 49:
            merge_some(Path(sys.argv[1]), 4)
"""


def test_readers_of_a_run_that_is_written_see_every_row_that_was_acknowledged_once(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    acknowledged = tmp_path / "acknowledged"
    acknowledged.write_bytes((2**62).to_bytes(8, "little"))
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(run_dir), str(acknowledged), str(Path(__file__).parent.parent)]
    )

    def last() -> int:
        return int.from_bytes(acknowledged.read_bytes(), "little")

    try:
        while last() == 2**62:
            assert child.poll() is None
            time.sleep(0.01)
        with ThreadPoolExecutor(2) as pool:
            for reads in (pool.submit(read_for_a_while, run_dir, last) for _ in range(2)):
                assert reads.result() > 3
    finally:
        child.kill()
        child.wait()


def read_for_a_while(run_dir: Path, last: Callable[[], int]) -> int:
    run, begun_s, reads = open_run(run_dir), time.monotonic(), 0
    cursor = run.follow("attention", ["step", "layer", "head"])
    followed = 0
    while time.monotonic() - begun_s < 3.0 or reads < 4:
        known = last()
        steps = run.steps(["step", "loss"])
        assert list(steps["step"]) == list(range(len(steps)))
        assert len(steps) > known
        assert steps["loss"].notna().all()
        known = last()
        measured = run.attention(["step", "layer", "head"])
        assert len(measured) >= (known // 4 + 1) * len(LAYERS) * HEADS
        assert not measured.duplicated().any()
        assert (measured.groupby("step").size() == len(LAYERS) * HEADS).all()
        known = last()
        news = cursor.read()
        followed += news.rows.num_rows
        assert news.replaces_from is None
        assert followed >= (known // 4 + 1) * len(LAYERS) * HEADS
        coarse = run.coarse("steps", 16, ["step", "loss_count"])
        assert (coarse["loss_count"][:-1] == 16).all()
        reads += 1
    assert not run.damaged
    return reads
