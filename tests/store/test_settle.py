"""What a dead writer left in the tail becomes parts: every row once, whenever it is killed in between."""

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic import write_table

from diagnostics.errors import DamagedDataWarning
from diagnostics.store.format import SCHEMAS, PartName
from diagnostics.store.lock import hold
from diagnostics.store.manifest import write_manifest
from diagnostics.store.names import used_names
from diagnostics.store.read import open_run
from diagnostics.store.tail.decode import steps_table
from diagnostics.store.tail.frames import MAGIC, NULL, PENDING, frame, names_frame, step_struct, table_frame
from diagnostics.store.tail.name import TailName
from diagnostics.store.tail.settle import settle

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

SEGMENT = 4096


def steps_row(step: int, **scalars: float | None) -> dict[str, Any]:
    return {
        "step": step, "time_s": 1000.0 + step, "loss": step / 2, "lr": 0.1, "grad_norm": None, "measured": step % 2 == 0,
        "overhead_s": 1e-6, **scalars,
    }  # fmt: skip


def updates_row(step: int) -> dict[str, Any]:
    return {"step": step, "parameter": "w", "ratio": step / 8}


def event_row(step: int) -> dict[str, Any]:
    return {"step": step, "time_s": 1000.0 + step, "kind": "alert", "message": f"at {step}", "data": "{}"}


def segment(rows: list[dict[str, Any]], names: tuple[str, ...] = (), size: int = SEGMENT) -> bytes:
    """A segment as a writer leaves it: frames, then zeros."""
    data = MAGIC + (names_frame(1, names) if names else b"")
    for row in rows:
        values = [PENDING if row[name] == "pending" else row[name] for name in names]
        data += frame(
            step_struct(len(names)).pack(
                ord("S"), row["step"], row["time_s"], row["overhead_s"], row["measured"], 1 if names else 0,
                row["loss"], NULL if row["lr"] is None else row["lr"], *values,
            )
        )  # fmt: skip
    return data.ljust(size, b"\0")


def rows_log(tables: dict[str, list[dict[str, Any]]]) -> bytes:
    frames = [
        table_frame(
            table,
            steps_table(rows, ()) if table == "steps" else pa.Table.from_pylist(rows, schema=SCHEMAS[table]),
        )
        for table, rows in tables.items()
    ]
    return MAGIC + b"".join(frames)


def put(run_dir: Path, name: TailName, data: bytes) -> Path:
    (run_dir / "tail").mkdir(parents=True, exist_ok=True)
    path = run_dir / "tail" / str(name)
    path.write_bytes(data)
    return path


def dead_run(run_dir: Path) -> Path:
    """Steps 0 to 5 are in part 0; of what part 1 would hold, `updates` was written already; generation 2 had begun."""
    write_table(run_dir, "steps", [steps_row(step) for step in range(6)], 0)
    write_table(run_dir, "updates", [updates_row(step) for step in (0, 2, 4)], 0)
    put(run_dir, TailName("steps", 1), segment([steps_row(step) for step in range(6, 9)]))
    put(run_dir, TailName("steps", 1, index=1), segment([steps_row(9)]))
    put(run_dir, TailName("steps", 1, index=2), segment([]))
    put(
        run_dir,
        TailName("rows", 1),
        rows_log({"updates": [updates_row(6), updates_row(8)], "events": [event_row(6)]}),
    )
    write_table(run_dir, "updates", [updates_row(step) for step in (6, 8)], 1)
    put(run_dir, TailName("steps", 2), segment([steps_row(step) for step in range(10, 12)]))
    put(run_dir, TailName("rows", 2), rows_log({"updates": [updates_row(10)], "events": [event_row(11)]}))
    write_manifest(run_dir, {"schema_version": 2, "run_id": "a", "state": "crashed"})
    return run_dir


EXPECTED = {"steps": list(range(12)), "updates": [0, 2, 4, 6, 8, 10], "events": [6, 11]}


def in_parts(run_dir: Path, table: str) -> list[int]:
    files = sorted((run_dir / table).glob("part-*.parquet"))
    return sorted(step for path in files for step in pq.read_table(path)["step"].to_pylist())


def tail_files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "tail").iterdir() if not path.name.startswith("."))


def test_every_row_of_the_tail_is_in_a_part_once_and_the_tail_is_empty(tmp_path: Path) -> None:
    settled = settle(dead_run(tmp_path))
    assert settled.rows == {"steps": 6, "events": 2, "updates": 1}
    assert (settled.damaged, settled.busy) == ({}, [])
    assert {table: in_parts(tmp_path, table) for table in EXPECTED} == EXPECTED
    assert tail_files(tmp_path) == []
    # A part is numbered as its generation was, and named after its steps.
    assert sorted(path.name for path in (tmp_path / "steps").iterdir()) == [
        "part-000000000000-000000000005-000000.parquet",
        "part-000000000006-000000000009-000001.parquet",
        "part-000000000010-000000000011-000002.parquet",
    ]
    rows = open_run(tmp_path).steps()
    assert list(rows["loss"]) == [step / 2 for step in range(12)]
    assert rows["grad_norm"].isna().all()


def test_settling_again_changes_nothing(tmp_path: Path) -> None:
    settle(dead_run(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    assert settle(tmp_path).rows == {}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_reader_sees_the_same_rows_before_and_after(tmp_path: Path) -> None:
    dead_run(tmp_path)
    run = open_run(tmp_path)
    before = {table: run.table(table) for table in SCHEMAS}
    settle(tmp_path)
    assert {table: run.table(table) for table in SCHEMAS} == before
    assert list(before["steps"]["step"].to_pylist()) == EXPECTED["steps"]


def killed_at(operation: int, run_dir: Path, job: Callable[[], object]) -> bool:
    """Runs a job in a forked child that dies at its so-manieth operation on files of a run; whether it died."""

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal operation
        if event not in (
            "open",
            "os.rename",
            "os.remove",
            "os.mkdir",
            "os.truncate",
            "os.listdir",
            "os.scandir",
        ):
            return
        if str(run_dir) in str(arguments[0]):
            operation -= 1
            if operation < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            sys.addaudithook(count)
            job()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def test_killed_at_any_operation_and_settled_again_every_row_is_there_once(tmp_path: Path) -> None:
    original = dead_run(tmp_path / "original")
    operation = 0
    while True:
        run_dir = tmp_path / f"killed-{operation}"
        shutil.copytree(original, run_dir)
        died = killed_at(operation, run_dir, lambda: settle(run_dir))  # noqa: B023 - run at once
        # Killed, not yet settled again: readers see every row once too.
        run = open_run(run_dir)
        seen = {table: run.table(table)["step"].to_pylist() for table in EXPECTED}
        assert seen == EXPECTED, f"operation {operation}"
        settle(run_dir)
        assert {table: in_parts(run_dir, table) for table in EXPECTED} == EXPECTED, f"operation {operation}"
        assert tail_files(run_dir) == []
        assert not list(run_dir.rglob("*.tmp"))
        shutil.rmtree(run_dir)
        if not died:
            break
        operation += 1
    # Four parts are written, each opened and renamed, and six files removed.
    assert operation >= 14


def test_the_rows_of_a_later_attempt_and_another_rank_say_so(tmp_path: Path) -> None:
    put(tmp_path, TailName("steps", 7, attempt=3, rank=2), segment([steps_row(4)]))
    put(tmp_path, TailName("rows", 7, attempt=3, rank=2), rows_log({"updates": [updates_row(4)]}))
    settle(tmp_path)
    for table in ("steps", "updates"):
        (path,) = (tmp_path / table).iterdir()
        assert path.name == "part-000000000004-000000000004-000007a3r2.parquet"
        schema = pq.read_schema(path)
        assert schema.names == [*SCHEMAS[table].names, "attempt", "rank"]
        assert schema.types[-2:] == [pa.int16(), pa.int16()]
        assert pq.read_table(path).select(["attempt", "rank"]).to_pylist() == [{"attempt": 3, "rank": 2}]


def test_each_rank_is_told_apart(tmp_path: Path) -> None:
    """A part of rank 0 says nothing of rank 1's rows, though its number is larger."""
    write_table(tmp_path, "steps", [steps_row(0)], 9)
    put(tmp_path, TailName("steps", 3, rank=1), segment([steps_row(0)]))
    put(tmp_path, TailName("steps", 3, rank=0), segment([steps_row(0)]))
    assert settle(tmp_path).rows == {"steps": 1}
    assert sorted(PartName.parse(path.name) or "" for path in (tmp_path / "steps").iterdir()) == [
        PartName(0, 0, 3, rank=1),
        PartName(0, 0, 9),
    ]


def test_rows_that_a_merged_part_holds_are_not_written_again(tmp_path: Path) -> None:
    path = write_table(tmp_path, "steps", [steps_row(step) for step in range(4)], 0)
    path.rename(path.with_name(str(PartName(0, 3, 5, merges=1))))
    put(tmp_path, TailName("steps", 5), segment([steps_row(3)]))
    assert settle(tmp_path).rows == {}
    assert in_parts(tmp_path, "steps") == [0, 1, 2, 3]
    assert tail_files(tmp_path) == []


def test_only_the_rank_asked_for_is_settled(tmp_path: Path) -> None:
    put(tmp_path, TailName("steps", 0, rank=1), segment([steps_row(0)]))
    put(tmp_path, TailName("steps", 0), segment([steps_row(0)]))
    lock = hold(tmp_path, 1)
    assert settle(tmp_path, 1).rows == {"steps": 1}
    lock.release()
    assert tail_files(tmp_path) == [str(TailName("steps", 0))]


def test_a_rank_that_records_is_left_alone(tmp_path: Path) -> None:
    put(tmp_path, TailName("steps", 0, rank=1), segment([steps_row(0)]))
    put(tmp_path, TailName("steps", 0), segment([steps_row(0)]))
    lock = hold(tmp_path, 1)
    settled = settle(tmp_path)
    lock.release()
    assert (settled.busy, settled.rows) == ([1], {"steps": 1})
    assert tail_files(tmp_path) == [str(TailName("steps", 0, rank=1))]


def test_scalars_keep_their_columns_and_those_on_a_device_are_null(tmp_path: Path) -> None:
    write_table(tmp_path, "steps", [steps_row(0, tokens=5.0)], 0)
    rows = [steps_row(1, rate=0.5), steps_row(2, rate="pending")]  # type: ignore[arg-type]
    put(tmp_path, TailName("steps", 1), segment(rows, ("rate",)))
    settle(tmp_path)
    (path,) = (tmp_path / "steps").glob("*-000001.parquet")
    part = pq.read_table(path)
    assert part.column_names == [*SCHEMAS["steps"].names, "rate", "tokens"]
    assert part["rate"].to_pylist() == [0.5, None]
    assert part["tokens"].null_count == 2


def test_a_damaged_file_is_kept_and_named_and_the_rest_of_it_is_in_parts(tmp_path: Path) -> None:
    data = bytearray(segment([steps_row(step) for step in range(3)]))
    data[len(MAGIC) + 8 + 3] ^= 0xFF  # within the first record
    broken = put(tmp_path, TailName("steps", 0), bytes(data))
    put(tmp_path, TailName("steps", 0, index=1), segment([steps_row(3)]))
    write_manifest(tmp_path, {"schema_version": 2, "run_id": "a", "state": "crashed"})
    settled = settle(tmp_path)
    assert list(settled.damaged) == [f"tail/{broken.name}.damaged"]
    assert in_parts(tmp_path, "steps") == [1, 2, 3]
    assert broken.with_name(f"{broken.name}.damaged").read_bytes() == bytes(data)
    assert tail_files(tmp_path) == [f"{broken.name}.damaged"]
    with pytest.warns(DamagedDataWarning, match=f"{broken.name}.damaged"):
        assert list(open_run(tmp_path).steps()["step"]) == [1, 2, 3]
    # Its number stays taken: a later file of this name would be put aside over it.
    assert used_names(tmp_path, 0).number == 0


def test_what_cannot_be_read_at_all_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / "tail" / str(TailName("steps", 0))).mkdir(parents=True)
    settled = settle(tmp_path)
    assert list(settled.damaged) == [f"tail/{TailName('steps', 0)}.damaged"]
    assert settle(tmp_path).damaged == {}


def test_files_that_are_none_of_ours_stay_as_they_are(tmp_path: Path) -> None:
    for name in ("notes.txt", "steps-x.log", "rows-000001-0000.log"):
        put(tmp_path, TailName("steps", 0), b"").with_name(name).write_text("mine")
    settle(tmp_path)
    assert tail_files(tmp_path) == ["notes.txt", "rows-000001-0000.log", "steps-x.log"]


def test_a_part_that_cannot_be_written_leaves_the_tail(tmp_path: Path) -> None:
    dead_run(tmp_path)
    shutil.rmtree(tmp_path / "steps")
    (tmp_path / "steps").write_text("a file where the folder belongs")
    before = tail_files(tmp_path)
    with pytest.raises(OSError, match="steps"):
        settle(tmp_path)
    assert tail_files(tmp_path) == before


def test_a_run_without_a_tail_is_left_without_one(tmp_path: Path) -> None:
    assert settle(tmp_path).rows == {}
    assert list(tmp_path.iterdir()) == []
