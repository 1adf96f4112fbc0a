import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from synthetic import write_run, write_table

from diagnostics.store.compact import compact_run
from diagnostics.store.merged import generation
from diagnostics.store.read import open_run
from diagnostics.store.write import PartWriter

Command = Callable[..., Any]


def write_parts(run: Path, first: int, last: int, *, number: int = 0) -> list[Path]:
    """One small part per step."""
    return [
        write_table(run, "steps", [{"step": step, "time_s": 0.0, "loss": float(step)}], number=number + step)
        for step in range(first, last)
    ]


def files_of(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "steps").iterdir())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = write_run(tmp_path, steps=0)
    write_parts(made, 0, 20)
    return made


def test_small_parts_become_one_and_the_rows_stay_the_same(diagnostics: Command, run: Path) -> None:
    before = open_run(run).table("steps")
    ended = diagnostics("compact", run)
    assert (ended.code, ended.err) == (0, "")
    assert "steps: 20 files -> 1" in ended.out.splitlines()
    assert len(files_of(run)) == 1
    assert open_run(run).table("steps").equals(before)


def test_any_parquet_reader_finds_each_row_once(run: Path) -> None:
    compact_run(run)
    steps = [
        step for name in files_of(run) for step in pq.read_table(run / "steps" / name)["step"].to_pylist()
    ]
    assert sorted(steps) == list(range(20))


def test_a_second_compaction_takes_in_what_was_written_since(run: Path) -> None:
    compact_run(run)
    (first,) = files_of(run)
    assert compact_run(run).files["steps"] == (1, 1)
    assert files_of(run) == [first]
    write_parts(run, 20, 25)
    assert compact_run(run).files["steps"] == (6, 1)
    assert open_run(run).steps()["step"].tolist() == list(range(25))


def test_all_tables_of_a_whole_run_read_the_same_afterwards(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=50, collapse=True)
    other = write_run(tmp_path, "other", steps=50)
    for table in ("steps", "attention", "spectra", "updates"):
        (part,) = (other / table).iterdir()
        shutil.copy(part, run / table / part.name.replace("000000.parquet", "000001.parquet"))
    before = {
        table: open_run(run).table(table) for table in ("steps", "attention", "spectra", "updates", "events")
    }
    assert compact_run(run).files["spectra"] == (2, 1)
    for table, rows in before.items():
        after = open_run(run).table(table)
        assert after.schema.equals(rows.schema, check_metadata=True)
        assert after.num_rows == rows.num_rows
        if table != "events":
            key = [("step", "ascending")]
            assert sorted(map(str, after.sort_by(key).to_pylist())) == sorted(
                map(str, rows.sort_by(key).to_pylist())
            )


def test_a_scalar_that_came_later_is_null_before(run: Path) -> None:
    write_table(run, "steps", [{"step": 20, "time_s": 0.0, "reward": 2.5}], number=20)
    compact_run(run)
    rewards = open_run(run).table("steps", ["reward"])["reward"].to_pylist()
    assert rewards == [None] * 20 + [2.5]


def test_parts_that_lie_beside_the_file_that_replaces_them_are_not_read_twice(
    run: Path, tmp_path: Path
) -> None:
    # What a kill between the rename and the removals leaves behind, and what a reader may meet in between.
    shutil.copytree(run / "steps", tmp_path / "old")
    compact_run(run)
    shutil.copytree(tmp_path / "old", run / "steps", dirs_exist_ok=True)
    assert len(files_of(run)) == 21
    assert open_run(run).steps()["step"].tolist() == list(range(20))
    assert open_run(run).steps(start_step=5, end_step=7)["step"].tolist() == [5, 6, 7]


def test_the_next_compaction_finishes_what_a_kill_interrupted(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "steps", tmp_path / "old")
    compact_run(run)
    shutil.copytree(tmp_path / "old", run / "steps", dirs_exist_ok=True)
    (run / "steps" / ".compact-1.tmp").write_bytes(b"half a file")
    write_parts(run, 20, 22)
    compact_run(run)
    assert len(files_of(run)) == 1
    assert open_run(run).steps()["step"].tolist() == list(range(22))


def test_a_damaged_merged_part_hides_none_of_the_parts_it_names(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "steps", tmp_path / "old")
    compact_run(run)
    (merged,) = files_of(run)
    (run / "steps" / merged).write_bytes((run / "steps" / merged).read_bytes()[:300])
    shutil.copytree(tmp_path / "old", run / "steps", dirs_exist_ok=True)
    result = compact_run(run)
    assert list(result.damaged) == [str(run / "steps" / merged)]
    reader = open_run(run)
    with pytest.warns(UserWarning, match="is damaged and was skipped"):
        assert reader.steps()["step"].tolist() == list(range(20))


def test_a_damaged_part_is_named_and_left_as_it_is(diagnostics: Command, run: Path) -> None:
    damaged = run / "steps" / files_of(run)[7]
    damaged.write_bytes(damaged.read_bytes()[:-30])
    content = damaged.read_bytes()
    ended = diagnostics("compact", run)
    assert ended.code == 0
    assert f"{damaged} is damaged and was left as it is" in ended.err
    assert damaged.read_bytes() == content
    assert len(files_of(run)) == 2


def test_a_part_that_is_being_written_is_left_alone(run: Path) -> None:
    temporary = run / "steps" / ".part-000000000020-000000000020-000020.parquet.tmp"
    temporary.write_bytes(b"half a file")
    compact_run(run)
    assert temporary.read_bytes() == b"half a file"


def test_large_parts_are_left_alone_and_no_file_outgrows_the_target(run: Path) -> None:
    one = (run / "steps" / files_of(run)[0]).stat().st_size
    untouched = files_of(run)
    assert compact_run(run, target_bytes=one).files["steps"] == (20, 20)
    assert files_of(run) == untouched
    # 5.5 small files fit: four files of five.
    assert compact_run(run, target_bytes=int(5.5 * one)).files["steps"] == (20, 4)


def test_rows_written_twice_by_a_resumed_run_stay_as_they_were(run: Path) -> None:
    write_parts(run, 15, 20, number=100)
    compact_run(run)
    write_parts(run, 19, 20, number=200)
    compact_run(run)
    assert open_run(run).steps()["step"].tolist() == sorted([*range(20), *range(15, 20), 19])


def test_a_reader_beside_a_compaction_sees_every_row_once_at_any_time(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=0)
    ended = threading.Event()

    writer = PartWriter(run)
    written = [0]

    def write_and_compact() -> None:
        for step in range(240):
            writer.add("steps", [{"step": step, "time_s": 0.0, "loss": float(step)}])
            writer.flush()
            written[0] = step + 1
            if step % 20 == 19:
                compact_run(run)
        ended.set()

    thread = threading.Thread(target=write_and_compact)
    thread.start()
    reads = 0
    while not ended.is_set():
        surely = written[0]
        steps = open_run(run).steps()["step"].tolist()
        assert len(steps) == len(set(steps))
        assert set(range(surely)) <= set(steps)
        reads += 1
    thread.join()
    assert reads
    assert open_run(run).steps()["step"].tolist() == list(range(240))
    assert [generation(name) for name in files_of(run)] == [12]


def test_a_second_compaction_at_the_same_time_is_refused(diagnostics: Command, run: Path) -> None:
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        ended = diagnostics("compact", run)
    finally:
        os.close(descriptor)
    assert ended.code == 2
    assert "another process is compacting" in ended.err
    assert len(files_of(run)) == 20


def test_a_path_that_is_no_run_gives_2(diagnostics: Command, tmp_path: Path) -> None:
    assert diagnostics("compact", tmp_path).code == 2
