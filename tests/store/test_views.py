"""What counts of a run with several attempts and ranks, while it moves from the tail into parts and merged parts."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scripted_writer import ScriptedWriter, merge_some, say
from synthetic import HEADS, LAYERS, write_run

from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import TABLES, PartName
from diagnostics.store.read import Run, open_run
from diagnostics.store.reading.view import View, first_steps


def steps_and_losses(run: Run) -> dict[int, float]:
    frame = run.steps(["step", "loss"])
    assert frame["step"].is_unique
    return dict(zip(frame["step"], frame["loss"], strict=True))


def record(writer: ScriptedWriter, steps: range, flush_after: int = 5) -> None:
    for step in steps:
        writer.step(step, measured=step % 2 == 0)
        writer.event(step, f"step {step}")
        if step % flush_after == 0:
            writer.flush()


def test_steps_that_a_later_attempt_computed_again_are_shown_as_it_recorded_them(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    first = ScriptedWriter(run_dir)
    record(first, range(14))
    first.die()
    alone = steps_and_losses(open_run(run_dir))
    second = first.resumed(2)
    assert steps_and_losses(open_run(run_dir)) == alone  # it has recorded no step yet
    record(second, range(7, 12))
    second.die()
    third = second.resumed(3)
    record(third, range(9, 11))
    for _ in range(2):
        run = open_run(run_dir)
        whole = {attempt: steps_and_losses(open_run(run_dir, attempt=attempt)) for attempt in (1, 2, 3)}
        assert {attempt: list(rows) for attempt, rows in whole.items()} == {
            1: list(range(14)),
            2: list(range(7, 12)),
            3: list(range(9, 11)),
        }
        shown = steps_and_losses(run)
        by = [1] * 7 + [2] * 2 + [3] * 2
        assert shown == {step: whole[attempt][step] for step, attempt in enumerate(by)}
        assert whole[1] == alone
        for table in ("attention", "spectra"):
            assert len(run.table(table)) == 6 * len(LAYERS) * HEADS
        assert list(run.events()["message"]) == [f"step {step}" for step in range(11)]
        assert list(run.steps(start_step=6, end_step=9)["step"]) == [6, 7, 8, 9]
        assert run.attempts == [1, 2, 3]
        for table in TABLES:
            assert not {"attempt", "rank"} & set(run.table(table).column_names)
        while merge_some(run_dir, 16):
            pass
    third.die()


def test_an_attempt_that_is_not_there_is_refused_in_words(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=10)
    assert len(open_run(run_dir, attempt=1).steps()) == 10
    with pytest.raises(DiagnosticsError, match=r"has no attempt 2; it has 1\. Leave attempt out"):
        open_run(run_dir, attempt=2)
    with pytest.raises(DiagnosticsError, match="holds no rows of rank 3; it holds 0"):
        open_run(run_dir, rank=3)


def test_every_rank_has_its_own_rows(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    writers = {rank: ScriptedWriter(run_dir, rank=rank) for rank in (0, 3)}
    for writer in writers.values():
        record(writer, range(8))
    for _ in range(2):
        assert open_run(run_dir).ranks == [0, 3]
        losses = {rank: steps_and_losses(open_run(run_dir, rank=rank)) for rank in writers}
        assert list(losses[0]) == list(losses[3]) == list(range(8))
        assert not set(losses[0].values()) & set(losses[3].values())
        merge_some(run_dir, 16)
    for writer in writers.values():
        writer.die()


def test_a_scalar_of_the_users_may_be_called_attempt(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    writer = ScriptedWriter(run_dir)
    writer.step(0, scalars={"attempt": 7.0, "rank": 2.0})
    assert open_run(run_dir).steps(["attempt", "rank"]).to_numpy().tolist() == [[7.0, 2.0]]
    writer.flush()
    assert open_run(run_dir).steps(["attempt", "rank"]).to_numpy().tolist() == [[7.0, 2.0]]
    writer.die()


def test_a_row_is_seen_once_wherever_the_flush_was_when_the_process_died(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    writer = ScriptedWriter(run_dir)
    record(writer, range(1, 5))
    expected = {table: open_run(run_dir).table(table).to_pylist() for table in TABLES}
    tail = {path: path.read_bytes() for path in (run_dir / "tail").iterdir()}
    writer.flush()
    writer.die()
    parts = [path for table in TABLES for path in (run_dir / table).iterdir()]
    assert len(parts) == len(TABLES)
    for path, content in tail.items():
        path.write_bytes(content)
    # The parts come one by one and the tail is there to the end.
    aside = [path.rename(tmp_path / f"{path.parent.name}-{path.name}") for path in parts]
    for count in range(len(parts) + 1):
        if count:
            aside[count - 1].rename(parts[count - 1])
        found = {table: open_run(run_dir).table(table).to_pylist() for table in TABLES}
        assert found == expected


def test_a_part_that_a_merged_one_stands_for_is_left_out(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    writer = ScriptedWriter(run_dir)
    record(writer, range(30))
    expected = {table: open_run(run_dir).table(table).to_pylist() for table in TABLES}
    merge_some(run_dir, 3, killed=True)
    assert len(list((run_dir / "attention").glob("*.parquet"))) == 7
    assert {table: open_run(run_dir).table(table).to_pylist() for table in TABLES} == expected
    writer.die()


def test_a_merge_between_listing_and_reading_is_met_by_reading_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    writer = ScriptedWriter(run_dir)
    record(writer, range(30))
    expected = open_run(run_dir).table("steps").to_pylist()
    opened = pq.ParquetFile.__init__
    merges = 2

    def merging_first(file: pq.ParquetFile, *args: object, **options: object) -> None:
        nonlocal merges
        if merges:
            merges -= 1
            with monkeypatch.context() as patch:
                patch.setattr(pq.ParquetFile, "__init__", opened)
                merge_some(run_dir, 2)
        opened(file, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "__init__", merging_first)
    assert open_run(run_dir).table("steps").to_pylist() == expected
    assert merges == 0
    writer.die()


def test_a_flush_between_the_tail_and_the_parts_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    writer = ScriptedWriter(run_dir)
    record(writer, range(1, 5))
    run = open_run(run_dir)
    tail = run.files.tail

    for before in (True, False):

        def flushing(*, steps: bool, before: bool = before) -> object:
            if before:
                writer.flush()
            found = tail(steps=steps)
            if not before:
                writer.flush()
            return found

        monkeypatch.setattr(run.files, "tail", flushing)
        assert list(run.table("steps")["step"].to_pylist()) == [1, 2, 3, 4]
        assert len(run.table("attention")) == 2 * len(LAYERS) * HEADS
    writer.die()


def test_the_first_steps_come_from_names_and_the_tail() -> None:
    parts = [PartName(5, 9, 0), PartName(0, 4, 1), PartName(3, 8, 2, attempt=2)]
    assert first_steps(parts, [(2, 2), (4, 7)]) == {1: 0, 2: 2, 4: 7}
    view = View({1: 0, 2: 2, 4: 7})
    assert [view.end(attempt) for attempt in (1, 2, 3, 4, 5)] == [2, 7, 7, None, None]
    assert view.last(1, 100) == 1
    assert view.last(4, 100) == 100
    assert view.last(4, None) is None
    assert not View({}, attempt=2).shows(1)


def test_files_of_a_thousand_parts_are_named_and_not_opened_outside_the_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    (run_dir / "steps").mkdir()
    for number in range(1000):
        rows = pa.table({"step": [2 * number, 2 * number + 1], "loss": [1.0, 2.0]})
        pq.write_table(rows, run_dir / "steps" / str(PartName(2 * number, 2 * number + 1, number)))
    opened: list[str] = []
    original = pq.ParquetFile.__init__

    def noting(file: pq.ParquetFile, source: str, *args: object, **options: object) -> None:
        opened.append(source)
        original(file, source, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "__init__", noting)
    assert open_run(run_dir).steps(["loss"], 1001, 1003)["loss"].tolist() == [2.0, 1.0, 2.0]
    assert len(opened) == 2
