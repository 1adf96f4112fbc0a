"""Merging part files: by levels, sorted, beside a reader, through kills at every operation, and on its own thread."""

import fcntl
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import write_run

from diagnostics.store.coarse.tables import CoarseWriter
from diagnostics.store.format import COARSE, SCHEMAS, TABLES, PartName
from diagnostics.store.parts import merging
from diagnostics.store.parts.file import write_part
from diagnostics.store.parts.folder import ROW_GROUP_ROWS, Folder, Part, folders
from diagnostics.store.parts.merge import merge
from diagnostics.store.parts.merged import REPLACES_KEY, replaced_by, without_replaced
from diagnostics.store.parts.merging import BusyError, Merger, all_small, alone, due, merge_folder
from diagnostics.store.read import open_run

# Forks of this process do nothing but merge.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

Row = dict[str, Any]

FAN_IN = 16
"""Of the tests: enough that a kill amid the removals leaves some."""


@pytest.fixture(autouse=True)
def _fan_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "FAN_IN", FAN_IN)


HEADS = [(layer, head) for layer in ("blocks.10.attn", "blocks.2.attn") for head in range(3)]


def rows_of(table: str, steps: range) -> list[Row]:
    """Rows of a table whose values all follow from step and key."""
    if table == "steps":
        return [{"step": step, "loss": 1.0 / (1 + step), "measured": step % 2 == 0} for step in steps]
    if table == "events":
        return [{"step": step, "kind": "alert", "message": f"at {step}"} for step in steps]
    if table == "updates":
        return [{"step": step, "parameter": name, "ratio": step / 8} for step in steps for name in ("b", "a")]
    metric = "entropy" if table == "attention" else "sigma1"
    return [
        {"step": step, "layer": layer, "head": head, metric: step + head / 4}
        | ({"singular_values": [step / 2, 0.25]} if table == "spectra" else {})
        for step in steps
        for layer, head in HEADS
    ]


def add(run: Path, table: str, rows: list[Row], number: int, *scalars: str, **writer: int) -> Path:
    schema = SCHEMAS[table]
    for scalar in scalars:
        schema = schema.append(pa.field(scalar, pa.float64()))
    steps = [row["step"] for row in rows]
    name = PartName(min(steps), max(steps), number, **writer)
    write_part(run / table, name, pa.Table.from_pylist(rows, schema=schema))
    return run / table / str(name)


def fill(run: Path, table: str, parts: int, *, first: int = 0, length: int = 2, **writer: int) -> None:
    for number in range(first, first + parts):
        add(run, table, rows_of(table, range(number * length, (number + 1) * length)), number, **writer)


def paths(run: Path, table: str) -> list[Path]:
    folder = run / table
    return sorted(path for path in folder.iterdir() if PartName.parse(path.name)) if folder.is_dir() else []


def names(run: Path, table: str) -> list[PartName]:
    return [name for path in paths(run, table) if (name := PartName.parse(path.name)) is not None]


def read(run: Path, table: str) -> list[Row]:
    """All rows as a reader has them, in an order of their own."""
    parts = [pq.ParquetFile(path).read() for path in without_replaced(paths(run, table))]
    whole = pa.concat_tables([*parts, SCHEMAS[table].empty_table()], promote_options="default")
    return sorted(whole.to_pylist(), key=lambda row: (row["step"], str(row)))


def merge_levels(run: Path, **options: Any) -> dict[Path, str]:
    damaged: dict[Path, str] = {}
    for folder in folders(run):
        merge_folder(folder, due, damaged=damaged, **options)
    return damaged


def test_enough_parts_of_a_level_become_one_of_the_next(tmp_path: Path) -> None:
    fill(tmp_path, "steps", FAN_IN - 1)
    merge_levels(tmp_path)
    assert len(names(tmp_path, "steps")) == FAN_IN - 1
    fill(tmp_path, "steps", 3, first=FAN_IN - 1)
    before = read(tmp_path, "steps")
    merge_levels(tmp_path)
    assert names(tmp_path, "steps") == [
        PartName(0, 31, 15, merges=1), PartName(32, 33, 16), PartName(34, 35, 17),
    ]  # fmt: skip
    assert read(tmp_path, "steps") == before


def test_many_parts_are_one_in_the_end(tmp_path: Path) -> None:
    for first in range(0, 256, 8):
        fill(tmp_path, "events", 8, first=first, length=1)
        merge_levels(tmp_path)
    assert names(tmp_path, "events") == [PartName(0, 255, 255, merges=2)]
    assert [row["step"] for row in read(tmp_path, "events")] == list(range(256))


@pytest.mark.parametrize("table", list(TABLES))
def test_every_table_reads_the_same_merged(tmp_path: Path, table: str) -> None:
    fill(tmp_path, table, FAN_IN)
    before = read(tmp_path, table)
    merge_levels(tmp_path)
    assert len(names(tmp_path, table)) == 1
    assert read(tmp_path, table) == before
    (path,) = paths(tmp_path, table)
    schema = pq.read_schema(path)
    assert schema.equals(SCHEMAS[table])
    assert {field.name: field.metadata.get(b"meaning") for field in schema} == {
        column.name: column.meaning.encode() for column in TABLES[table]
    }
    assert not list((tmp_path / table).glob(".*"))


@pytest.mark.parametrize(
    ("table", "keys"),
    [("attention", ["layer", "head", "step"]), ("spectra", ["layer", "head", "step"]),
     ("updates", ["parameter", "step"]), ("steps", ["step"])],
)  # fmt: skip
def test_one_series_lies_together(tmp_path: Path, table: str, keys: list[str]) -> None:
    fill(tmp_path, table, FAN_IN)
    merge_levels(tmp_path)
    (path,) = paths(tmp_path, table)
    found = [tuple(row[key] for key in keys) for row in pq.ParquetFile(path).read().to_pylist()]
    assert found == sorted(found)


def test_merged_parts_of_a_sorted_table_are_merged_into_a_sorted_one(tmp_path: Path) -> None:
    fill(tmp_path, "attention", FAN_IN * FAN_IN, length=1)
    merge_levels(tmp_path)
    (path,) = paths(tmp_path, "attention")
    rows = pq.ParquetFile(path).read(["layer", "head", "step"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        (layer, head, step) for layer, head in sorted(HEADS) for step in range(FAN_IN * FAN_IN)
    ]


def wide(run: Path, steps: range, number: int) -> None:
    """A part of 64 heads whose values do not compress."""
    count = 64 * len(steps)
    rng = np.random.default_rng(number)
    columns: dict[str, Any] = {
        "step": np.repeat(np.asarray(steps), 64),
        "layer": ["a", "b"] * (count // 2),
        "head": np.tile(np.arange(64, dtype=np.int16) // 2, len(steps)),
    }
    for field in SCHEMAS["attention"]:
        if field.name not in columns:
            values = rng.integers(1, 99, count) if field.name == "rows" else rng.standard_normal(count)
            columns[field.name] = values.astype(field.type.to_pandas_dtype())
    rows = pa.table(
        [pa.array(columns[field.name], field.type) for field in SCHEMAS["attention"]],
        schema=SCHEMAS["attention"],
    )
    write_part(run / "attention", PartName(steps[0], steps[-1], number), rows)


def test_one_head_touches_a_small_share_of_a_merged_file(tmp_path: Path) -> None:
    for number in range(FAN_IN):
        wide(tmp_path, range(number * 200, (number + 1) * 200), number)
    merge_levels(tmp_path)
    (path,) = paths(tmp_path, "attention")
    metadata = pq.read_metadata(path)
    rows = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    assert set(rows[:-1]) == {ROW_GROUP_ROWS}
    touched = 0
    for index in range(metadata.num_row_groups):
        columns = {
            metadata.row_group(index).column(at).path_in_schema: metadata.row_group(index).column(at)
            for at in range(metadata.num_columns)
        }
        layer, head = columns["layer"].statistics, columns["head"].statistics
        if layer.min <= "b" <= layer.max and head.min <= 5 <= head.max:
            touched += sum(columns[name].total_compressed_size for name in ("step", "head", "entropy"))
    assert 0 < touched < 0.05 * path.stat().st_size
    series = pq.read_table(
        path, columns=["step"], filters=(pc.field("layer") == "b") & (pc.field("head") == 5)
    )
    assert series["step"].to_pylist() == list(range(16 * 200))


def test_attempts_and_ranks_are_never_mixed(tmp_path: Path) -> None:
    fill(tmp_path, "steps", FAN_IN)
    fill(tmp_path, "steps", FAN_IN, first=FAN_IN, attempt=2)
    fill(tmp_path, "steps", FAN_IN, rank=3)
    fill(tmp_path, "steps", FAN_IN - 1, first=2 * FAN_IN, attempt=3)
    before = read(tmp_path, "steps")
    merge_levels(tmp_path)
    assert [name for name in names(tmp_path, "steps") if name.merges] == [
        PartName(0, 31, 15, 1, 0, 1), PartName(0, 31, 15, 1, 3, 1), PartName(32, 63, 31, 2, 0, 1),
    ]  # fmt: skip
    assert len(names(tmp_path, "steps")) == 3 + FAN_IN - 1
    assert read(tmp_path, "steps") == before


def test_a_merger_of_one_rank_leaves_the_others_alone(tmp_path: Path) -> None:
    fill(tmp_path, "steps", FAN_IN)
    fill(tmp_path, "steps", FAN_IN, rank=1)
    unfinished = tmp_path / "steps" / f".merge-{PartName(0, 31, 15, 1, 1, 1)}.tmp"
    unfinished.write_bytes(b"half")
    merge_levels(tmp_path, rank=0)
    assert [(name.rank, name.merges) for name in names(tmp_path, "steps")].count((0, 1)) == 1
    assert [(name.rank, name.merges) for name in names(tmp_path, "steps")].count((1, 0)) == FAN_IN
    assert unfinished.exists()
    merge_levels(tmp_path)
    assert not unfinished.exists()


def test_who_wrote_a_row_stays_in_the_last_columns_when_a_scalar_comes_later(tmp_path: Path) -> None:
    fill(tmp_path, "steps", FAN_IN - 1, attempt=2, rank=1)
    rows: list[Row] = [{"step": 100, "reward": 2.5}]
    add(tmp_path, "steps", rows, FAN_IN, "reward", attempt=2, rank=1)
    merge_levels(tmp_path)
    (path,) = paths(tmp_path, "steps")
    table = pq.ParquetFile(path).read()
    assert table.column_names == [*SCHEMAS["steps"].names, "reward", "attempt", "rank"]
    assert table["reward"].to_pylist() == [None] * 30 + [2.5]
    assert set(table["attempt"].to_pylist()) == {2}


def test_a_damaged_part_is_named_and_the_others_are_merged(tmp_path: Path) -> None:
    fill(tmp_path, "attention", FAN_IN + 1)
    damaged = paths(tmp_path, "attention")[3]
    content = bytearray(damaged.read_bytes())
    content[100:140] = bytes(40)
    damaged.write_bytes(content)
    assert list(merge_levels(tmp_path)) == [damaged]
    assert damaged.read_bytes() == bytes(content)
    assert [name.merges for name in names(tmp_path, "attention")].count(1) == 1
    (merged,) = [path for path in paths(tmp_path, "attention") if path != damaged]
    assert replaced_by(merged) == {
        str(PartName(2 * number, 2 * number + 1, number)) for number in range(FAN_IN + 1) if number != 3
    }


def test_a_part_whose_columns_do_not_fit_is_named_and_left(tmp_path: Path) -> None:
    fill(tmp_path, "steps", FAN_IN - 1)
    add(tmp_path, "steps", [{"step": 30, "reward": 1.0}], FAN_IN - 1, "reward")
    odd = tmp_path / "steps" / str(PartName(31, 31, FAN_IN))
    whole = SCHEMAS["steps"].append(pa.field("reward", pa.int64()))
    pq.write_table(pa.Table.from_pylist([{"step": 31, "reward": 2}], schema=whole), odd)
    strange = tmp_path / "steps" / str(PartName(32, 32, FAN_IN + 1))
    pq.write_table(pa.table({"loss": [31.0]}), strange)
    damaged: dict[Path, str] = {}
    merge_folder(Folder(tmp_path / "steps", "steps"), all_small, damaged=damaged)
    assert set(damaged) == {odd, strange}
    assert damaged[odd] == "its column 'reward' is int64, that of earlier parts is double"
    assert damaged[strange] == "it has no column 'step'"
    assert len(names(tmp_path, "steps")) == 3


def test_a_level_ends_where_files_are_large_enough(tmp_path: Path) -> None:
    for number in range(FAN_IN):
        wide(tmp_path, range(number * 10, (number + 1) * 10), number)
    one = max(path.stat().st_size for path in paths(tmp_path, "attention"))
    folder = Folder(tmp_path / "attention", "attention")
    assert due(folder.parts(), 2 * one) == []
    assert len(due(folder.parts(), 5 * one)) == 5
    assert [part.name.number for part in all_small(folder.parts(), 5 * one)] == [0, 1, 2, 3, 4]


def test_parts_that_would_not_fit_into_memory_are_not_merged_into_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "spectra", FAN_IN)
    fill(tmp_path, "steps", FAN_IN)
    held = [part.held for part in Folder(tmp_path / "spectra", "spectra").parts()]
    monkeypatch.setattr(merging, "HELD_BYTES", 4 * max(held))
    assert len(due(Folder(tmp_path / "spectra", "spectra").parts())) == 4
    monkeypatch.setattr(merging, "HELD_BYTES", 2 * min(held))
    assert due(Folder(tmp_path / "spectra", "spectra").parts()) == []
    # Rows that keep their order are streamed.
    assert len(due(Folder(tmp_path / "steps", "steps").parts())) == FAN_IN


def test_parts_between_larger_ones_are_merged_only_with_their_neighbours(tmp_path: Path) -> None:
    fill(tmp_path, "steps", 3)
    add(tmp_path, "steps", rows_of("steps", range(6, 3000)), 3)
    fill(tmp_path, "steps", 2, first=1500)
    small = max(path.stat().st_size for path in paths(tmp_path, "steps")[:3])
    parts = Folder(tmp_path / "steps", "steps").parts()
    assert [part.name.number for part in all_small(parts, 3 * small)] == [0, 1, 2]
    assert [part.name.number for part in all_small(parts[3:], 3 * small)] == [1500, 1501]
    assert all_small(parts[2:4], 3 * small) == []


@given(st.lists(st.sampled_from(["write", "levels", "all"]), min_size=1, max_size=40))
@settings(deadline=None, max_examples=15)
def test_any_order_of_writing_and_merging_keeps_each_row_once(
    tmp_path_factory: pytest.TempPathFactory, acts: list[str]
) -> None:
    run = tmp_path_factory.mktemp("run")
    number = 0
    for act in acts:
        if act == "write":
            fill(run, "updates", 7, first=number, length=1)
            number += 7
        else:
            choose = due if act == "levels" else all_small
            merge_folder(Folder(run / "updates", "updates"), choose, damaged={})
    assert [row["step"] for row in read(run, "updates")] == sorted([*range(number), *range(number)])
    assert max((name.number for name in names(run, "updates")), default=-1) == number - 1


def test_coarse_folders_are_merged_too(tmp_path: Path) -> None:
    writer = CoarseWriter(tmp_path, attempt=1, rank=0, every=1)
    for number in range(FAN_IN):
        steps = range(number * 16, (number + 1) * 16)
        for table in ("steps", "attention"):
            writer.take(table, pa.Table.from_pylist(rows_of(table, steps), schema=SCHEMAS[table]))
        writer.write(number)
    merge_levels(tmp_path)
    for table, rows in (("steps", 16), ("attention", 16 * len(HEADS))):
        (path,) = paths(tmp_path / COARSE / "16", table)
        assert PartName.parse(path.name) == PartName(0, 255, 15, merges=1)
        merged = pq.ParquetFile(path).read()
        assert merged.num_rows == rows
        assert b"over 16 steps" in merged.schema.field(-1).metadata[b"meaning"]


# --- kills ------------------------------------------------------------------------------------------------

_CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")


def forked(work: Callable[[], None]) -> int:
    """Runs `work` in a forked process; its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def until_operation(number: int, folder: Path, work: Callable[[], object]) -> Callable[[], None]:
    """`work`, killed right before it changes the folder for the `number`-th time."""

    def doomed() -> None:
        left = [number]

        def count() -> None:
            if not left[0]:
                os._exit(9)
            left[0] -= 1

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _CHANGES and str(folder) in str(arguments[0]):
                count()

        fsync = os.fsync

        def counted_fsync(descriptor: Any) -> None:
            count()
            fsync(descriptor)

        setattr(os, "fsync", counted_fsync)  # noqa: B010 - in this process, which ends here
        sys.addaudithook(hook)
        work()
        os._exit(0)

    return doomed


@pytest.mark.parametrize("table", ["steps", "attention"])
def test_killed_at_any_operation_the_run_reads_the_same_and_the_next_merge_finishes(
    tmp_path: Path, table: str
) -> None:
    codes = []
    for number in range(200):
        run = tmp_path / str(number)
        run.mkdir()
        fill(run, table, FAN_IN + 2)
        before = read(run, table)
        codes.append(forked(until_operation(number, run, partial(merge_levels, run))))
        assert read(run, table) == before
        assert merge_levels(run) == {}
        assert read(run, table) == before
        assert [name.merges for name in names(run, table)] == [1, 0, 0]
        assert not list((run / table).glob(".*"))
        if codes[-1] == 0:
            break
    # Opening, syncing and renaming the new file, syncing the folder, and the removals of the parts at least.
    assert codes == [9] * (len(codes) - 1) + [0]
    assert len(codes) > FAN_IN + 4


def test_a_kill_amid_the_removals_leaves_nothing_to_be_merged_twice(tmp_path: Path) -> None:
    fill(tmp_path, "steps", 2 * FAN_IN)
    before = read(tmp_path, "steps")
    # Some seven operations come before the first removal: about half of the parts are gone then.
    assert forked(until_operation(14, tmp_path, lambda: merge_levels(tmp_path))) == 9
    assert len(names(tmp_path, "steps")) > FAN_IN + 1
    assert len(without_replaced(paths(tmp_path, "steps"))) == FAN_IN + 1
    fill(tmp_path, "steps", 4, first=2 * FAN_IN)
    merge_levels(tmp_path)
    assert read(tmp_path, "steps") == before + [
        row for row in read(tmp_path, "steps") if row["step"] >= 4 * FAN_IN
    ]
    assert len(names(tmp_path, "steps")) == 2 + 4


def test_a_merged_part_that_cannot_be_read_costs_none_of_the_parts_it_stands_for(tmp_path: Path) -> None:
    fill(tmp_path, "steps", FAN_IN)
    kept = {path: path.read_bytes() for path in paths(tmp_path, "steps")}
    merge_levels(tmp_path)
    (merged,) = paths(tmp_path, "steps")
    content = bytearray(merged.read_bytes())
    content[40:80] = bytes(40)  # a page; the footer, with the names, is intact
    merged.write_bytes(content)
    for path, old in kept.items():
        path.write_bytes(old)
    assert list(merge_levels(tmp_path)) == [merged]
    (again,) = [path for path in paths(tmp_path, "steps") if path != merged]
    assert replaced_by(again) == {path.name for path in kept}
    assert pq.ParquetFile(again).read()["step"].to_pylist() == list(range(2 * FAN_IN))


def test_the_names_of_the_replaced_are_read_only_where_one_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path, "steps", FAN_IN + 2)
    first = paths(tmp_path, "steps")[0]
    content = first.read_bytes()
    merge_levels(tmp_path)
    listed = paths(tmp_path, "steps")
    opened: list[Path] = []
    original = pq.read_metadata

    def noted(path: Path) -> Any:
        opened.append(path)
        return original(path)

    monkeypatch.setattr(pq, "read_metadata", noted)
    assert without_replaced(listed) == listed
    assert opened == []
    first.write_bytes(content)
    assert without_replaced([first, *listed]) == listed
    assert opened == [listed[0]]


# --- readers and threads ----------------------------------------------------------------------------------


def write_and_merge(run: Path, written: Any) -> None:
    for number in range(120):
        for table in ("steps", "attention"):
            add(run, table, rows_of(table, range(number, number + 1)), number)
        written.value = number + 1
        if number % 5 == 0:
            merge_levels(run)


def test_readers_beside_a_merging_process_see_each_row_once(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=0)
    context = multiprocessing.get_context("fork")
    written = context.Value("i", 0)
    process = context.Process(target=write_and_merge, args=(run, written))
    process.start()
    reads = 0
    while process.is_alive():
        for table, look in itertools.product(("steps", "attention"), (snapshot, seen_by_open_run)):
            surely = written.value
            steps = look(run, table)
            rows = len(HEADS) if table == "attention" else 1
            assert len(steps) == rows * len(set(steps))
            assert set(range(surely)) <= set(steps)
            reads += 1
    process.join()
    assert process.exitcode == 0
    assert reads > 4
    assert len(names(run, "steps")) < 40


def snapshot(run: Path, table: str) -> list[int]:
    """The steps that are there, listed anew where a merge took a part away meanwhile."""
    while True:
        listed = paths(run, table)
        try:
            parts = [pq.ParquetFile(path).read(["step"]) for path in without_replaced(listed)]
        except FileNotFoundError:
            continue
        # A merged part that came meanwhile may stand for parts that were gone before they were met.
        if {path for path in paths(run, table) if "m" in path.name[40:]} <= set(listed):
            return [step for part in parts for step in part["step"].to_pylist()]


def seen_by_open_run(run: Path, table: str) -> list[int]:
    steps: list[int] = open_run(run).table(table, ["step"])["step"].to_pylist()
    return steps


def directly(job: Callable[[], None]) -> bool:
    job()
    return True


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def merger(tmp_path: Path) -> Iterator[Merger]:
    made = Merger(tmp_path, directly)
    yield made
    made.stop()


def test_a_merger_merges_when_poked_and_on_a_thread_of_its_own(tmp_path: Path, merger: Merger) -> None:
    before = threading.active_count()
    fill(tmp_path, "steps", FAN_IN)
    fill(tmp_path, "attention", FAN_IN)
    assert threading.active_count() == before
    merger.poke()
    eventually(lambda: len(names(tmp_path, "steps") + names(tmp_path, "attention")) == 2)
    fill(tmp_path, "steps", FAN_IN, first=FAN_IN)
    merger.poke()
    eventually(lambda: len(names(tmp_path, "steps")) == 2)
    assert threading.active_count() == before + 1
    merger.stop()
    assert threading.active_count() == before
    merger.poke()
    assert threading.active_count() == before


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no priorities of threads")
def test_only_the_mergers_thread_yields_to_training(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def look(_: Callable[[], None]) -> bool:
        seen.append(
            (
                os.getpriority(os.PRIO_PROCESS, threading.get_native_id()),
                os.getpriority(os.PRIO_PROCESS, threading.main_thread().native_id or 0),
            )
        )
        return True

    merger = Merger(tmp_path, look)
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    merger.poke()
    eventually(lambda: bool(seen))
    merger.stop()
    assert seen == [(min(19, 10), before)]


def test_after_a_fault_nothing_more_is_merged(tmp_path: Path) -> None:
    tried: list[object] = []

    def failing(job: Callable[[], None]) -> bool:
        tried.append(job)
        return False

    merger = Merger(tmp_path, failing)
    merger.poke()
    eventually(lambda: len(tried) == 1)
    merger.poke()
    merger.stop()
    assert len(tried) == 1


def test_a_damaged_part_is_looked_at_once(tmp_path: Path, merger: Merger) -> None:
    fill(tmp_path, "steps", FAN_IN)
    paths(tmp_path, "steps")[5].write_bytes(b"PAR1 and no more")
    merger._merge()
    assert len(merger._damaged) == 1
    assert len(names(tmp_path, "steps")) == FAN_IN
    assert not any(merger._is_full(folder) for folder in folders(tmp_path))
    fill(tmp_path, "steps", 1, first=FAN_IN)
    merger._merge()
    assert len(names(tmp_path, "steps")) == 2


def test_while_another_process_merges_a_merger_waits_for_the_next_poke(
    tmp_path: Path, merger: Merger
) -> None:
    fill(tmp_path, "steps", FAN_IN)
    with alone(tmp_path):
        merger._merge()
        assert len(names(tmp_path, "steps")) == FAN_IN
        with pytest.raises(BusyError), alone(tmp_path, 0.1):
            pass
    merger._merge()
    assert len(names(tmp_path, "steps")) == 1


def test_a_process_forked_amid_a_merge_does_not_keep_others_from_merging(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ended = context.Event()
    with alone(tmp_path):
        worker = context.Process(target=ended.wait)
        worker.start()
    with alone(tmp_path):
        pass
    ended.set()
    worker.join()


def test_without_locks_a_merger_merges_its_own_rank_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    fill(tmp_path, "steps", FAN_IN)
    fill(tmp_path, "steps", FAN_IN, rank=1)
    Merger(tmp_path, directly)._merge()
    assert len(names(tmp_path, "steps")) == 2 * FAN_IN
    Merger(tmp_path, directly, rank=0)._merge()
    assert [name.rank for name in names(tmp_path, "steps")].count(0) == 1
    assert [name.rank for name in names(tmp_path, "steps")].count(1) == FAN_IN


def test_a_merge_that_is_stopped_leaves_no_trace(tmp_path: Path) -> None:
    fill(tmp_path, "steps", FAN_IN)
    before = {path: path.read_bytes() for path in (tmp_path / "steps").iterdir()}
    asked: list[bool] = []

    def stopped() -> bool:
        asked.append(True)
        return len(asked) > 1

    merge_levels(tmp_path, stopped=stopped)
    assert len(asked) > 1
    assert {path: path.read_bytes() for path in (tmp_path / "steps").iterdir()} == before


def test_a_part_that_vanishes_stops_the_folders_merge_and_nothing_else(tmp_path: Path) -> None:
    fill(tmp_path, "steps", 2)
    folder = Folder(tmp_path / "steps", "steps")
    gone = Part(folder, PartName(4, 5, 2))
    merge_folder(folder, lambda parts: [*parts, gone], damaged={})
    assert len(names(tmp_path, "steps")) == 2
    with pytest.raises(FileNotFoundError):
        merge([*folder.parts(), gone])
    assert not list((tmp_path / "steps").glob(".*"))


_EXIT_AMID_A_MERGE = """
import sys, threading, pathlib
import pandas  # which pyarrow loads with the first row that is written
import diagnostics.store.parts.merging as merging
begun = threading.Event()
original = merging.merge
def merge(parts, **options):
    begun.set()
    while True:  # one merge after the other, until it is stopped
        original(parts, **options)
merging.merge = merge
def contained(job):
    job()
    return True
run = pathlib.Path(sys.argv[1])
merging.Merger(run, contained).poke()
assert begun.wait(30)
"""


def test_the_interpreter_ends_in_order_amid_a_merge(tmp_path: Path) -> None:
    for number in range(FAN_IN):
        wide(tmp_path, range(number * 100, (number + 1) * 100), number)
    ended = subprocess.run(
        [sys.executable, "-c", _EXIT_AMID_A_MERGE, str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not list((tmp_path / "attention").glob(".*"))


_PEAK = """
import pathlib, sys
import pyarrow as pa
from diagnostics.store.parts.folder import folders
from diagnostics.store.parts.merging import all_small, merge_folder
for folder in folders(pathlib.Path(sys.argv[1])):
    merge_folder(folder, all_small, damaged={})
print(pa.default_memory_pool().max_memory())
"""


def test_merging_holds_no_more_than_it_may(tmp_path: Path) -> None:
    # 3.2 million rows of steps, which compress to next to nothing, and 10 large parts of attention.
    rows = pa.Table.from_pylist([{"step": 0, "loss": 1.0}], schema=SCHEMAS["steps"])
    many = pa.concat_tables([rows] * 1).take(pa.array(np.zeros(1_600_000, np.int64)))
    for number in range(2):
        write_part(tmp_path / "steps", PartName(0, 0, number), many)
    for number in range(10):
        wide(tmp_path, range(number * 3000, (number + 1) * 3000), number)
    ended = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(ended.stdout) < 200 * 2**20
    assert len(names(tmp_path, "steps")) == 1
    assert len(names(tmp_path, "attention")) < 10
    (merged,) = paths(tmp_path, "steps")
    assert pq.read_metadata(merged).num_rows == 3_200_000
    assert REPLACES_KEY in pq.read_metadata(merged).metadata
