import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from synthetic import write_run, write_table

from diagnostics.errors import DiagnosticsError
from diagnostics.store import compact
from diagnostics.store.compact import compact_run
from diagnostics.store.format import PartName
from diagnostics.store.lock import RECORDS, holding
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


def test_large_parts_are_left_alone_and_no_file_outgrows_the_target(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=0)
    rng = np.random.default_rng(0)
    for number in range(20):
        steps = range(number * 500, (number + 1) * 500)
        losses = rng.standard_normal(500)
        rows = [{"step": step, "loss": loss} for step, loss in zip(steps, losses, strict=True)]
        write_table(run, "steps", rows, number=number)
    sizes = [(run / "steps" / name).stat().st_size for name in files_of(run)]
    untouched = files_of(run)
    assert compact_run(run, target_bytes=min(sizes)).files["steps"] == (20, 20)
    assert files_of(run) == untouched
    target = int(5.5 * max(sizes))
    compact_run(run, target_bytes=target)
    assert 2 <= len(files_of(run)) <= 5
    assert all((run / "steps" / name).stat().st_size <= target for name in files_of(run))
    assert open_run(run).steps()["step"].tolist() == list(range(10_000))


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
        for step in range(120):
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
    assert open_run(run).steps()["step"].tolist() == list(range(120))
    assert [part.merges for name in files_of(run) if (part := PartName.parse(name))] == [6]


@contextmanager
def compacting(run: Path) -> Iterator[None]:
    """What another process does that merges this run."""
    descriptor = os.open(run, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def test_a_second_compaction_at_the_same_time_is_refused(
    diagnostics: Command, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "PATIENCE_S", 0.1)
    with compacting(run):
        ended = diagnostics("compact", run)
    assert ended.code == 2
    assert "another process is compacting" in ended.err
    assert len(files_of(run)) == 20


def test_a_merge_that_is_soon_over_is_waited_for(run: Path) -> None:
    held = compacting(run)
    held.__enter__()
    timer = threading.Timer(0.3, held.__exit__, (None, None, None))
    timer.start()
    assert compact_run(run).files["steps"] == (20, 1)
    timer.join()


def test_where_there_are_no_locks_nothing_is_merged(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DiagnosticsError, match="compact needs file locks"):
        compact_run(run)
    assert len(files_of(run)) == 20


def test_what_a_dead_writer_left_in_the_tail_becomes_parts(diagnostics: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=0)
    PartWriter(run).add("updates", [{"step": 3, "parameter": "w", "ratio": 0.5}])
    before = open_run(run).updates()
    assert len(list((run / "tail").glob("*.log"))) == 1
    ended = diagnostics("compact", run)
    assert (ended.code, ended.err) == (0, "")
    assert {"updates: 0 files -> 1", "tail: 1 files -> 0"} <= set(ended.out.splitlines())
    assert not list((run / "tail").glob("*.log"))
    assert open_run(run).updates().equals(before)


def test_the_tail_of_a_run_that_is_recorded_is_left_alone_and_its_parts_are_merged(run: Path) -> None:
    with holding(run, purpose=RECORDS):
        PartWriter(run, number=100).add("updates", [{"step": 3, "parameter": "w", "ratio": 0.5}])
        result = compact_run(run)
    assert result.files["steps"] == (20, 1)
    assert result.files["tail"] == (1, 1)
    assert not (run / "updates").exists()


def stored(run: Path, table: str, resolution: int) -> list[dict[str, Any]]:
    paths = sorted((run / "coarse" / str(resolution) / table).iterdir())
    return [row for path in paths for row in pq.ParquetFile(path).read().to_pylist()]


def test_coarse_tables_are_merged_as_well(diagnostics: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=0)
    writer = PartWriter(run, every=1)
    for step in range(512):
        writer.add("steps", [{"step": step, "time_s": 0.0, "loss": 1.0 / (1 + step)}])
        if step % 64 == 63:
            writer.flush()
    assert len(list((run / "coarse" / "16" / "steps").iterdir())) == 8
    before = stored(run, "steps", 16)
    ended = diagnostics("compact", run)
    assert {"coarse/16/steps: 8 files -> 1", "coarse/256/steps: 2 files -> 1"} <= set(ended.out.splitlines())
    assert stored(run, "steps", 16) == before
    assert [row["step"] for row in before] == list(range(0, 512, 16))


def test_a_run_of_the_first_schema_reads_the_same_afterwards(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(Path(__file__).parents[2] / "sample_runs" / "gpt-warmup", run)
    for table in ("steps", "attention"):
        # As the release that wrote it merged them, and what a recorder of that time adds.
        (merged,) = (run / table).iterdir()
        rows = pq.ParquetFile(merged).read().slice(0, 40)
        first, last = rows["step"][0].as_py(), rows["step"][-1].as_py()
        pq.write_table(rows, run / table / f"part-{first:012d}-{last:012d}-000900.parquet")
    before = {table: open_run(run).table(table) for table in ("steps", "attention", "spectra", "updates")}
    assert compact_run(run).files["attention"] == (2, 1)
    for table, rows in before.items():
        after = open_run(run).table(table)
        assert sorted(map(str, after.to_pylist())) == sorted(map(str, rows.to_pylist()))
    assert all(not name.startswith(".") for name in files_of(run))


def test_a_path_that_is_no_run_gives_2(diagnostics: Command, tmp_path: Path) -> None:
    assert diagnostics("compact", tmp_path).code == 2
