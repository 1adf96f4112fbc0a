"""Rows lie in the tail once `add` returns and in parts after a flush; whoever looks sees each of them once."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import write_run

from diagnostics.store.coarse.tables import CoarseWriter
from diagnostics.store.format import SCHEMAS
from diagnostics.store.read import open_run
from diagnostics.store.tail.decode import read_tables
from diagnostics.store.write import PartWriter


def attention(step: int) -> list[dict[str, Any]]:
    return [{"step": step, "layer": "a", "head": head, "entropy": step + head / 2} for head in range(2)]


def event(step: int) -> list[dict[str, Any]]:
    words = {"kind": "alert", "severity": "info", "message": "m", "data": "{}"}
    return [{"step": step, "time_s": 1.0 + step, "layer": None, "head": None, **words}]


def step_row(step: int, **scalars: float) -> dict[str, Any]:
    row = {"step": step, "time_s": 1.0, "loss": 0.5, "lr": None, "measured": False, "overhead_s": 0.0}
    return row | scalars


def files(run_dir: Path) -> list[str]:
    return sorted(
        str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.suffix in (".parquet", ".log")
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return write_run(tmp_path, steps=0)


def test_rows_are_in_the_tail_when_add_returns_and_in_parts_alone_after_the_flush(run_dir: Path) -> None:
    writer = PartWriter(run_dir)
    assert files(run_dir) == []
    writer.add("attention", attention(3))
    writer.add("events", event(3))
    assert files(run_dir) == ["tail/rows-000000.log"]
    log = read_tables((run_dir / "tail" / "rows-000000.log").read_bytes())
    assert [(table, rows.num_rows) for table, rows in log.batches] == [("attention", 2), ("events", 1)]
    assert (writer.pending, writer.number) == (3, 0)
    writer.flush()
    assert (writer.pending, writer.number) == (0, 1)
    assert files(run_dir) == [
        "attention/part-000000000003-000000000003-000000.parquet",
        "events/part-000000000003-000000000003-000000.parquet",
    ]
    part = pq.read_table(run_dir / "attention" / "part-000000000003-000000000003-000000.parquet")
    assert part.schema.equals(SCHEMAS["attention"], check_metadata=True)
    assert part.column("entropy").to_pylist() == [3.0, 3.5]


def test_every_flush_has_a_number_of_its_own_that_all_its_tables_share(run_dir: Path) -> None:
    writer = PartWriter(run_dir, number=5)
    for step in range(2):
        writer.add("attention", attention(step))
        writer.add("events", event(step))
        writer.flush()
    assert [name.rpartition("-")[2] for name in files(run_dir)] == ["000005.parquet", "000006.parquet"] * 2


def test_parts_of_later_attempts_and_other_ranks_say_whose_they_are_at_the_end(run_dir: Path) -> None:
    writer = PartWriter(run_dir, attempt=2, rank=3, number=4)
    writer.add("attention", attention(0))
    assert files(run_dir) == ["tail/rows-000004a2r3.log"]
    writer.flush()
    assert files(run_dir) == ["attention/part-000000000000-000000000000-000004a2r3.parquet"]
    part = pq.read_table(run_dir / files(run_dir)[0])
    assert part.column_names == [*SCHEMAS["attention"].names, "attempt", "rank"]
    assert part.select(["attempt", "rank"]).to_pylist() == [{"attempt": 2, "rank": 3}] * 2
    assert part.schema.field("attempt").type == pa.int16()


def test_a_scalar_once_seen_keeps_its_column_in_every_later_part(run_dir: Path) -> None:
    writer = PartWriter(run_dir)
    for number, scalars in enumerate([{"a": 1.0}, {"b": 2.0}, {}]):
        writer.add_logged_steps([step_row(2 * number), step_row(2 * number + 1, **scalars)])
        writer.flush()
    extra = [pq.read_schema(run_dir / name).names[len(SCHEMAS["steps"]) :] for name in files(run_dir)]
    assert extra == [["a"], ["a", "b"], ["a", "b"]]
    table = open_run(run_dir).table("steps", ["a", "b"])
    assert table.column("a").to_pylist() == [None, 1.0, None, None, None, None]
    assert table.column("b").to_pylist() == [None, None, None, 2.0, None, None]


def refuse(monkeypatch: pytest.MonkeyPatch, table: str) -> None:
    """Makes the disk refuse the parts of one table."""
    original = pq.write_table

    def refusing(rows: pa.Table, file: Any, **options: Any) -> None:
        if f"/{table}/" in file.name:
            file.write(b"PAR1")
            raise OSError(28, "No space left on device")
        original(rows, file, **options)

    monkeypatch.setattr(pq, "write_table", refusing)


def test_a_table_whose_part_fails_keeps_its_rows_for_the_next_flush_and_readers_see_them_all_along(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen() -> tuple[list[int], list[int]]:
        run = open_run(run_dir)
        tables = run.table("attention", ["step"]), run.table("events", ["step"])
        return tables[0].column("step").to_pylist(), tables[1].column("step").to_pylist()

    writer = PartWriter(run_dir)
    writer.add("attention", attention(0))
    writer.add("events", event(0))
    with monkeypatch.context() as full:
        refuse(full, "attention")
        with pytest.raises(OSError, match="No space left"):
            writer.flush()
    assert files(run_dir) == ["events/part-000000000000-000000000000-000000.parquet", "tail/rows-000000.log"]
    assert not list(run_dir.rglob("*.tmp"))
    assert seen() == ([0, 0], [0])
    writer.add("attention", attention(1))
    writer.add("events", event(1))
    assert seen() == ([0, 0, 1, 1], [0, 1])
    writer.flush()
    assert seen() == ([0, 0, 1, 1], [0, 1])
    assert not list((run_dir / "tail").iterdir())


def test_rows_that_come_while_a_flush_is_written_are_of_the_next(run_dir: Path) -> None:
    writer = PartWriter(run_dir)
    writer.add("attention", attention(0))
    flush = writer.begin_flush()
    writer.add("attention", attention(1))
    assert files(run_dir) == ["tail/rows-000000.log", "tail/rows-000001.log"]
    writer.write(flush)
    assert files(run_dir) == [
        "attention/part-000000000000-000000000000-000000.parquet",
        "tail/rows-000001.log",
    ]
    assert open_run(run_dir).table("attention", ["step"]).column("step").to_pylist() == [0, 0, 1, 1]


def test_half_a_frame_that_the_disk_refused_is_taken_back(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = PartWriter(run_dir)
    writer.add("events", event(0))
    original = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) > 40:
            return original(file, data[:40])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space left"):
            writer.add("events", event(1))
    writer.add("events", event(2))
    log = read_tables((run_dir / "tail" / "rows-000000.log").read_bytes())
    assert [rows.column("step").to_pylist() for _, rows in log.batches] == [[0], [2]]
    assert log.damage == []
    # What the tail could not take is in memory still.
    writer.flush()
    assert open_run(run_dir).table("events", ["step"]).column("step").to_pylist() == [0, 1, 2]


def test_coarse_tables_are_written_beside_and_a_fault_in_them_costs_no_row(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = []

    def contained_for(culprit: str, function: Any, *arguments: Any) -> bool:
        try:
            function(*arguments)
        except ZeroDivisionError:
            faults.append(culprit)
            return False
        return True

    writer = PartWriter(run_dir, every=1, contained_for=contained_for)
    writer.add_logged_steps([step_row(step) for step in range(32)])
    writer.flush()
    assert files(run_dir) == [
        "coarse/16/steps/part-000000000000-000000000031-000000.parquet",
        "steps/part-000000000000-000000000031-000000.parquet",
    ]

    def faulty(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(CoarseWriter, "take", faulty)
    writer.add_logged_steps([step_row(step) for step in range(32, 64)])
    writer.flush()
    assert len(faults) == 1
    assert open_run(run_dir).table("steps", ["step"]).column("step").to_pylist() == list(range(64))
