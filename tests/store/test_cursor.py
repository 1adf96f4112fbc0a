"""Cursors: what they hand out is what a reader sees, and a read costs what is new."""

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow.fs import LocalFileSystem
from scripted_writer import ScriptedWriter, merge_some, say
from synthetic import HEADS, LAYERS, write_run

from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import TABLES, part_name
from diagnostics.store.place import LocalPlace, RemotePlace
from diagnostics.store.read import Run, open_run
from diagnostics.store.reading.spans import Spans


class Applied:
    """A follower's copy of a table: what the cursor handed out, without what it took back."""

    def __init__(self, run: Run, table: str) -> None:
        self.cursor = run.follow(table)
        self.rows: list[dict[str, Any]] = []

    def update(self) -> int:
        news = self.cursor.read()
        if news.replaces_from is not None:
            before = len(self.rows)
            self.rows = [row for row in self.rows if row["step"] < news.replaces_from]
            assert len(self.rows) < before, "nothing was taken back"
        steps = news.rows.column("step").to_pylist()
        assert steps == sorted(steps)
        self.rows += news.rows.to_pylist()
        return len(steps)


def counted(rows: list[dict[str, Any]]) -> Counter[str]:
    """Rows and how often each is there; a scalar that a row lacks is as good as null."""
    return Counter(repr(sorted((k, v) for k, v in row.items() if v is not None)) for row in rows)


OPS = st.one_of(
    st.tuples(st.just("steps"), st.integers(-6, 12)),  # below zero: their loss lies on a device
    st.tuples(st.just("flush"), st.just(0)),
    st.tuples(st.just("event"), st.integers(0, 60)),
    st.tuples(
        st.just("merge"), st.sampled_from([-3, -2, 2, 3, 4])
    ),  # below zero: killed before it is through
    st.tuples(st.sampled_from(["die", "die_in_flush"]), st.just(0)),
    st.tuples(st.just("resume"), st.integers(-5, 15)),
    st.tuples(st.just("read"), st.integers(1, 31)),
)


class Following:
    """A run that is written, merged, killed and resumed while a cursor follows each table."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        say(run_dir)
        self.writer = ScriptedWriter(run_dir)
        self.copies = {table: Applied(open_run(run_dir), table) for table in TABLES}
        self.attempt, self.step_number, self.alive, self.event_count = 1, 0, True, 0

    def do(self, op: str, number: int) -> None:
        if op in ("die", "die_in_flush", "steps", "flush", "event") and not self.alive:
            return
        getattr(self, op)(number)

    def steps(self, number: int) -> None:
        for step in range(self.step_number, self.step_number + abs(number)):
            if number < 0:
                self.writer.step(step, pending=True)
            else:
                self.writer.step(step, measured=step % 3 == 0, scalars={"extra": 0.5} if step > 10 else None)
        self.step_number += abs(number)

    def flush(self, _: int) -> None:
        self.writer.flush()

    def event(self, step: int) -> None:
        self.event_count += 1
        self.writer.event(step, f"event {self.event_count}")

    def merge(self, count: int) -> None:
        merge_some(self.run_dir, abs(count), killed=count < 0)

    def die(self, _: int) -> None:
        self.writer.die()
        self.alive = False
        say(self.run_dir, state="crashed")

    def die_in_flush(self, _: int) -> None:
        """The parts are written and the tail that they were made of is still there."""
        self.writer.absorb()
        tail = {path: path.read_bytes() for path in (self.run_dir / "tail").iterdir()}
        self.writer.flush()
        for path, content in tail.items():
            if not path.exists():
                path.write_bytes(content)
        self.die(0)

    def resume(self, back: int) -> None:
        if not self.alive:
            self.attempt, self.alive = self.attempt + 1, True
            self.writer = self.writer.resumed(self.attempt)
            self.step_number = max(0, self.step_number - back)
            say(self.run_dir, attempt=self.attempt)

    def read(self, tables: int) -> None:
        for index, (table, copy) in enumerate(self.copies.items()):
            if tables >> index & 1:
                copy.update()
                seen = open_run(self.run_dir).table(table).to_pylist()
                if table == "steps" and self.alive and self.writer.pending:
                    seen = [row for row in seen if row["step"] < min(self.writer.pending)]
                assert counted(copy.rows) == counted(seen), table


@settings(max_examples=100, deadline=None)
@given(st.lists(OPS, max_size=30))
def test_what_cursors_handed_out_is_what_a_reader_sees(ops: list[tuple[str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        following = Following(Path(folder) / "run")
        for op, number in [*ops, ("read", 31)]:
            following.do(op, number)
        if following.alive:
            following.writer.die()


class Reads:
    """Counts the bytes and files that readers get."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.files = 0
        self.rows = 0
        opened = pq.ParquetFile.read_row_groups

        def read_row_groups(file: pq.ParquetFile, *args: Any, **options: Any) -> pa.Table:
            rows = opened(file, *args, **options)
            self.files += 1
            self.rows += rows.num_rows
            return rows

        monkeypatch.setattr(pq.ParquetFile, "read_row_groups", read_row_groups)


def many_parts(run_dir: Path, count: int, steps: int) -> None:
    """Parts of `steps` steps each."""
    (run_dir / "steps").mkdir(parents=True)
    for number in range(count):
        first = number * steps
        rows = pa.table({"step": list(range(first, first + steps)), "loss": [1.0] * steps})
        pq.write_table(rows, run_dir / "steps" / part_name(first, first + steps - 1, number))


def test_a_read_of_a_run_of_a_thousand_parts_opens_only_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    many_parts(run_dir, 1000, 3)
    cursor = open_run(run_dir).follow("steps", ["loss", "step"])
    assert cursor.read().rows.num_rows == 3000
    reads = Reads(monkeypatch)
    assert cursor.read().rows.num_rows == 0
    assert (reads.files, reads.rows) == (0, 0)
    rows = pa.table({"step": [3000, 3001], "loss": [2.0, 3.0]})
    pq.write_table(rows, run_dir / "steps" / part_name(3000, 3001, 1000))
    assert cursor.read().rows.to_pydict() == {"loss": [2.0, 3.0], "step": [3000, 3001]}
    assert (reads.files, reads.rows) == (1, 2)


@pytest.mark.parametrize("table", ["steps", "attention", "events"])
def test_a_flush_and_a_merge_of_rows_that_were_read_cost_nothing(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    writer = ScriptedWriter(run_dir)
    copy = Applied(open_run(run_dir), table)
    seen = 0
    for number in range(4):
        for step in range(6 * number, 6 * number + 6):
            writer.step(step, measured=step % 3 == 0)
        writer.event(6 * number, "an event")
        seen += copy.update()
        writer.flush()
        if table == "events":
            assert copy.update() == 0  # events are told apart by what is in them, which takes one look
    reads = Reads(monkeypatch)
    assert copy.update() == 0
    merge_some(run_dir, 4)
    assert not list((run_dir / table).glob("*-000003.parquet"))
    assert copy.update() == 0
    assert (reads.files, reads.rows) == (0, 0)
    expected = {"steps": 24, "attention": 8 * len(LAYERS) * HEADS, "events": 4}
    assert seen == len(copy.rows) == expected[table]
    writer.die()


def test_of_a_tail_only_what_was_added_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    writer = ScriptedWriter(run_dir)
    cursor = open_run(run_dir).follow("attention")
    for step in range(300):
        writer.step(step, measured=True)
    assert cursor.read().rows.num_rows == 300 * len(LAYERS) * HEADS
    size = 0
    read_bytes = LocalPlace.read_bytes

    def counting(place: LocalPlace, start: int = 0) -> bytes:
        nonlocal size
        data = read_bytes(place, start)
        size += len(data)
        return data

    monkeypatch.setattr(LocalPlace, "read_bytes", counting)
    assert cursor.read().rows.num_rows == 0
    assert size == 0
    log = next((run_dir / "tail").glob("rows-*"))
    before = log.stat().st_size
    writer.step(300, measured=True)
    assert cursor.read().rows.num_rows == len(LAYERS) * HEADS
    assert size == log.stat().st_size - before
    writer.die()


def test_a_step_whose_loss_lies_on_a_device_comes_once_it_is_known(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    writer = ScriptedWriter(run_dir)
    cursor = open_run(run_dir).follow("steps", ["step", "loss"])
    writer.step(0)
    writer.step(1, pending=True)
    writer.step(2)
    loss = writer.pending[1]
    assert cursor.read().rows.column("step").to_pylist() == [0]
    writer.absorb()
    rows = cursor.read().rows
    assert rows.column("step").to_pylist() == [1, 2]
    assert rows.column("loss").to_pylist()[0] == loss
    writer.step(3, pending=True)
    assert cursor.read().rows.num_rows == 0
    writer.die()
    say(run_dir, state="crashed")
    assert cursor.read().rows.to_pydict() == {"step": [3], "loss": [None]}


@pytest.mark.parametrize("start", [0, 6, 8, 9])
def test_a_new_attempt_takes_back_the_steps_that_it_computes_again(start: int, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    first = ScriptedWriter(run_dir)
    run = open_run(run_dir)
    steps, attention = run.follow("steps", ["step"]), run.follow("attention", ["step"])
    for step in range(10):
        first.step(step, measured=step % 4 == 0)
    assert steps.read().rows.num_rows == 10
    assert attention.read().replaces_from is None
    first.die()
    second = first.resumed(2)
    assert steps.read().replaces_from is None  # it has no step yet
    again = list(range(start, start + 3))
    for step in again:
        second.step(step, measured=step % 4 == 0)
    news = steps.read()
    assert (news.replaces_from, news.rows.column("step").to_pylist()) == (start, again)
    measured = [step for step in again for _ in LAYERS for _ in range(HEADS) if step % 4 == 0]
    news = attention.read()
    assert news.rows.column("step").to_pylist() == measured
    assert news.replaces_from == (None if start > 8 else start)  # step 8 was the last that was measured
    assert steps.read().replaces_from is None
    second.die()


def test_parts_that_arrive_out_of_order_at_a_store_elsewhere_are_all_handed_out(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir)
    many_parts(run_dir, 4, 5)
    late = run_dir / "steps" / part_name(5, 9, 1)
    aside = tmp_path / late.name
    late.rename(aside)
    run = open_run(RemotePlace("s3://bucket/run", str(run_dir), LocalFileSystem()))
    cursor = run.follow("steps", ["step"])
    assert cursor.read().rows.num_rows == 15
    aside.rename(late)
    assert cursor.read().rows.column("step").to_pylist() == [5, 6, 7, 8, 9]
    assert cursor.read().rows.num_rows == 0


def test_what_a_cursor_cannot_follow_is_refused_in_words(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, steps=10))
    with pytest.raises(DiagnosticsError, match="there is no table 'loss'"):
        run.follow("loss")
    with pytest.raises(DiagnosticsError, match="asks for nothing"):
        run.follow("steps", [])
    with pytest.raises(DiagnosticsError, match="no column 'los'; it has step"):
        run.follow("steps", ["los"]).read()


SPANS = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda s: (s[0], s[0] + s[1])), max_size=8
)


@given(SPANS, SPANS, st.integers(0, 40), st.integers(0, 40))
def test_spans_are_sets_of_steps(
    added: list[tuple[int, int]], removed: list[tuple[int, int]], low: int, high: int
) -> None:
    spans, steps = Spans(), set[int]()
    for first, last in added:
        spans.add(first, last)
        steps |= set(range(first, last + 1))
    for first, last in removed:
        spans.remove(first, last)
        steps -= set(range(first, last + 1))
    asked = np.arange(45)
    assert asked[spans.holding(asked)].tolist() == sorted(steps)
    assert spans.last == max(steps, default=None)
    assert [step for first, last in spans for step in range(first, last + 1)] == sorted(steps)
    if low <= high:
        assert spans.holds(low, high) == (set(range(low, high + 1)) <= steps)
    in_gaps = [step for first, last in spans.gaps(low, high) for step in range(first, last + 1)]
    assert in_gaps == [step for step in range(low, high + 1) if step not in steps]
    spans.cut(low)
    assert asked[spans.holding(asked)].tolist() == [step for step in sorted(steps) if step < low]
