"""Any order of recording, flushing, merging, compacting, dying and resuming shows exactly what was put on record."""

import itertools
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from dying import check_coarse
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from scribe import Arriving, Attempt, Scribe, died, dying_at, same_value

from diagnostics.store import write
from diagnostics.store.compact import compact_run
from diagnostics.store.parts import merging
from diagnostics.store.parts.merge import folders
from diagnostics.store.place import Place
from diagnostics.store.read import Run, open_run
from diagnostics.store.reading import tail, tail_follow
from diagnostics.store.reading.tail import read_bytes
from diagnostics.store.tail.settle import settle

_TABLES = ("steps", "attention", "spectra", "updates", "events")
_KEYS = {
    "steps": ("step",),
    "attention": ("step", "layer", "head"),
    "spectra": ("step", "layer", "head"),
    "updates": ("step", "parameter"),
}
_EXAMPLES = int(os.environ.get("INTERLEAVINGS", "80"))

numbers = st.one_of(
    st.none(), st.sampled_from([math.nan, math.inf, -math.inf, -0.0, 0.0, 1e308, 5e-324]), st.floats()
)
operations = st.one_of(
    st.tuples(st.just("steps"), st.integers(1, 9), numbers, st.integers(0, 4)),
    st.tuples(st.just("steps"), st.integers(10, 30), numbers, st.integers(0, 4)),
    st.tuples(st.just("measure"), st.floats(0, 5, width=32)),
    st.tuples(st.just("event"), st.sampled_from(["alike", "other"]), st.integers(0, 9)),
    st.tuples(st.just("look")),
    st.tuples(
        st.sampled_from(["flush", "flush", "merge", "compact"]), st.one_of(st.none(), st.integers(1, 30))
    ),
    st.tuples(st.just("failing flush"), st.sampled_from(_TABLES)),
    st.tuples(st.sampled_from(["die", "settle"]), st.one_of(st.none(), st.integers(1, 15))),
    st.tuples(st.just("go back"), st.integers(0, 12), st.one_of(st.none(), st.integers(1, 25))),
)


def effective(attempts: list[Attempt]) -> dict[str, list[dict[str, Any]]]:
    """The rows of all attempts: what a later one recorded from its first step on replaces all from there on."""
    shown: dict[str, list[dict[str, Any]]] = {table: [] for table in _TABLES}
    for attempt in attempts:
        first = attempt.first_step
        for table in _TABLES:
            kept = shown[table] if first is None else [row for row in shown[table] if row["step"] < first]
            shown[table] = kept + attempt.rows[table]
    return shown


def check_tables(run: Run, expected: dict[str, list[dict[str, Any]]]) -> None:
    for table in _TABLES:
        check_rows(run.table(table), expected[table], table)
    assert run.damaged == {}


def check_rows(found: pa.Table, expected: list[dict[str, Any]], table: str) -> None:
    rows = found.to_pylist()
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    if table == "events":
        key = lambda row: (row["step"], row["message"])  # noqa: E731 - of this table alone
        assert sorted(map(key, rows)) == sorted(map(key, expected))
        return
    keys = _KEYS[table]
    by_key = {tuple(row[name] for name in keys): row for row in rows}
    assert len(by_key) == len(rows), f"{table}: a row is there twice"
    wanted = {tuple(row[name] for name in keys): row for row in expected}
    assert by_key.keys() == wanted.keys(), f"{table}: {sorted(by_key.keys() ^ wanted.keys())[:9]}"
    for at, row in wanted.items():
        for name, value in row.items():
            assert same_value(by_key[at].get(name), value), (
                f"{table} {at}: {name} is {by_key[at].get(name)!r}, {value!r} was put on record"
            )


class Followed:
    """A cursor for each table, and what they handed out so far."""

    def __init__(self, run_dir: Path) -> None:
        self._run = open_run(run_dir)
        self._cursors = {table: self._run.follow(table) for table in _TABLES}
        self._rows: dict[str, list[dict[str, Any]]] = {table: [] for table in _TABLES}

    def check(self, expected: dict[str, list[dict[str, Any]]], *, waiting: int | None) -> None:
        """Reads on and compares; steps from `waiting` on may be held back, as a scalar of theirs is on a device."""
        for table, cursor in self._cursors.items():
            news = cursor.read()
            kept = self._rows[table]
            if news.replaces_from is not None:
                kept = [row for row in kept if row["step"] < news.replaces_from]
            self._rows[table] = kept + news.rows.to_pylist()
            wanted = expected[table]
            if table == "steps" and waiting is not None:
                wanted = [row for row in wanted if row["step"] < waiting]
            names = list(dict.fromkeys(itertools.chain(*self._rows[table])))
            rows = sorted(self._rows[table], key=lambda row: row["step"])
            columns = {name: [row.get(name) for row in rows] for name in names}
            check_rows(pa.table(columns) if rows else news.rows.slice(0, 0), wanted, table)


class Story:
    """Carries the operations out, one after the other, and checks all that a reader can see after each.

    Args:
        root: folder for the run directory and for the copies that deaths leave.
        silent: whether nothing is checked.
    """

    def __init__(self, root: Path, *, silent: bool = False) -> None:
        self.silent = silent
        self._places = (root / f"run-{number}" for number in itertools.count())
        self._scribe = Scribe(next(self._places))
        self._followed = Followed(self._scribe.run_dir)

    def tell(self, operation: tuple[Any, ...]) -> None:
        name, *arguments = operation
        getattr(self, f"_{name.replace(' ', '_')}")(*arguments)
        self._scribe.settled()
        if not self.silent:
            shown = effective(self._scribe.attempts)
            check_tables(open_run(self._scribe.run_dir), shown)
            self._followed.check(shown, waiting=self._scribe.waiting)

    def close(self) -> None:
        self._scribe.let_go()

    def end(self) -> None:
        scribe = self._scribe
        scribe.look()
        scribe.settled()
        for number, attempt in enumerate(scribe.attempts, 1):
            check_tables(open_run(scribe.run_dir, attempt=number), attempt.rows)
        scribe.let_go()
        run = open_run(scribe.run_dir)
        check_coarse(run, 16)
        settle(scribe.run_dir)
        compact_run(scribe.run_dir)
        run = open_run(scribe.run_dir)
        check_tables(run, effective(scribe.attempts))
        check_coarse(run, 16)
        assert [path.name for path in (scribe.run_dir / "tail").iterdir() if path.name[0] != "."] == []

    def _steps(self, count: int, value: float | None, kind: int) -> None:
        for _ in range(count):
            step = self._scribe.next_step
            scalars: dict[str, float | None] = {}
            if kind >= 1:
                scalars["first"] = value
            if kind == 2:
                scalars[f"late {step // 20}"] = -float(step)
            late = {"loss": float(step), "far": math.nan} if kind == 3 else {}
            self._scribe.step(value if step % 3 else step * 0.5, scalars, late=late)

    def _measure(self, value: float) -> None:
        self._scribe.measure(value)

    def _event(self, message: str, back: int) -> None:
        self._scribe.event(message, max(self._scribe.next_step - back, 0))

    def _look(self) -> None:
        self._scribe.look()

    def _flush(self, death: int | None) -> None:
        with self._perhaps_dying(death):
            self._scribe.flush()

    def _failing_flush(self, table: str) -> None:
        self._scribe.flush(failing=table)

    def _merge(self, death: int | None) -> None:
        with self._perhaps_dying(death):
            for folder in folders(self._scribe.run_dir):
                merging.merge_folder(folder, merging.due, damaged={})

    def _compact(self, death: int | None) -> None:
        with self._perhaps_dying(death):
            compact_run(self._scribe.run_dir)

    def _die(self, death: int | None) -> None:
        into = next(self._places)
        self._scribe.die(into)
        self._resume(into, death)

    def _settle(self, death: int | None) -> None:
        """The process dies; somebody settles what it left, and dies perhaps as well."""
        into = next(self._places)
        self._scribe.die(into)
        after = next(self._places)
        with dying_at(into, death or 10**9, after):
            settle(into)
        self._resume(after, None)

    def _go_back(self, back: int, death: int | None) -> None:
        with self._perhaps_dying(death):
            self._scribe.go_back(max(self._scribe.next_step - back, 0))

    @staticmethod
    def _see_what_arrived(run_dir: Path, attempts: list[Attempt]) -> None:
        """Of values that were on their way when the process died, the files say once and for all whether they came."""
        for number, attempt in enumerate(attempts, 1):
            waiting = [
                row for row in attempt.rows["steps"] if any(isinstance(v, Arriving) for v in row.values())
            ]
            if waiting:
                found = {
                    row["step"]: row for row in open_run(run_dir, attempt=number).table("steps").to_pylist()
                }
                for row in waiting:
                    row |= {
                        name: found[row["step"]].get(name) for name in row if isinstance(row[name], Arriving)
                    }

    @contextmanager
    def _perhaps_dying(self, death: int | None) -> Iterator[None]:
        """Around an operation; where a death is due in it, the story goes on with what that left."""
        if death is None:
            yield
            return
        into = next(self._places)
        with dying_at(self._scribe.run_dir, death, into):
            yield
        self._scribe.let_go()
        self._resume(into, None)

    def _resume(self, run_dir: Path, death: int | None) -> None:
        """Another process records into what is left; it may die while it claims it, and another comes."""
        attempts, next_step = self._scribe.attempts, self._scribe.next_step
        shown = effective(attempts)
        if (run_dir / "run.json").exists():
            check_tables(open_run(run_dir), shown)
            self._see_what_arrived(run_dir, attempts)
        if death is not None:
            after = next(self._places)
            with dying_at(run_dir, death, after):
                Scribe(run_dir, attempts).let_go()
            run_dir = after
            if (run_dir / "run.json").exists():
                check_tables(open_run(run_dir), shown)
        self._scribe = Scribe(run_dir, attempts)
        self._scribe.next_step = max(0, next_step - 5)
        self._followed = Followed(run_dir)


@pytest.fixture(autouse=True)
def _small_merges_without_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "FAN_IN", 3)
    monkeypatch.setattr(write, "_LEAST_BUCKETS", 2)
    monkeypatch.setattr(os, "fsync", lambda _: None)


@settings(
    max_examples=_EXAMPLES,
    derandomize="INTERLEAVINGS" not in os.environ,
    deadline=None,
    database=None,
    # A failing story is shrunk only where somebody asks for it: that takes minutes.
    phases=[Phase.generate, *([Phase.shrink] if os.environ.get("SHRINK") else [])],
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.data_too_large,
    ],
)
@given(st.lists(operations, min_size=4, max_size=25))
def test_whatever_happens_in_whatever_order_readers_see_what_was_put_on_record(
    tmp_path: Path, story: list[tuple[Any, ...]]
) -> None:
    root = tmp_path / "story"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    told = Story(root)
    try:
        for operation in story:
            told.tell(operation)
        told.end()
    finally:
        told.close()


BEFORE: list[tuple[Any, ...]] = [
    ("steps", 6, 1.0, 2),
    ("measure", 1.0),
    ("flush", None),
    ("steps", 12, math.nan, 3),
    ("measure", 2.0),
    ("event", "alike", 1),
    ("flush", None),
    ("go back", 3, None),
    ("steps", 9, None, 1),
    ("measure", 3.0),
    ("flush", None),
    ("steps", 20, 0.5, 2),
    ("measure", 4.0),
    ("failing flush", "attention"),
    ("event", "alike", 1),
    ("steps", 15, math.inf, 3),
    ("measure", 5.0),
    ("flush", None),
    ("steps", 3, 2.0, 1),
    ("measure", 6.0),
    ("event", "other", 0),
]


@pytest.mark.parametrize("last", ["flush", "compact", "go back", "die", "settle"])
def test_a_death_at_every_single_file_operation_changes_nothing_that_is_read(
    tmp_path: Path, last: str
) -> None:
    for operation in itertools.count(1):
        root = tmp_path / "story"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        story = Story(root, silent=True)
        for before in BEFORE:
            story.tell(before)
        if last in {"die", "settle"}:
            story.tell(("failing flush", "steps"))
        story.silent = False
        story.tell((last, 4, operation) if last == "go back" else (last, operation))
        reached = died()
        if operation % 8 == 1 or not reached:
            story.tell(("steps", 4, 1.0, 1))
            story.end()
        story.close()
        if not reached:
            break
    print(f"{last}: {operation - 1} operations")
    assert operation > 8


@pytest.mark.parametrize("at", range(4))
def test_steps_that_come_while_the_tail_is_read_are_handed_out_with_the_next_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    scribe = Scribe(tmp_path / "run")
    for step in range(8):
        scribe.step(float(step), {})
    scribe.look()  # the segment that comes next is there already, and is listed
    run = open_run(scribe.run_dir)
    cursor = run.follow("steps")
    reads = 0

    def read_and_record(file: Place, start: int = 0) -> bytes | str | None:
        nonlocal reads
        data = read_bytes(file, start)
        if reads == at:
            for _ in range(12):  # more than the rest of the first segment holds
                scribe.step(float(scribe.next_step), {})
        reads += 1
        return data

    monkeypatch.setattr(tail_follow, "read_bytes", read_and_record)
    monkeypatch.setattr(tail, "read_bytes", read_and_record)
    taken = cursor.read().rows.column("step").to_pylist()
    assert taken == list(range(len(taken))), "steps were handed out before those in front of them"
    shown = run.table("steps").column("step").to_pylist()
    assert shown == list(range(len(shown)))
    reads = 100
    taken += cursor.read().rows.column("step").to_pylist()
    assert taken == list(range(scribe.next_step))
    scribe.let_go()
