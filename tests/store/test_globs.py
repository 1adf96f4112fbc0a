"""Other tools glob the part files and see what `open_run` shows: pandas, pyarrow, duckdb, polars."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from dying import QUICK, Nursery, same

from diagnostics.store.compact import compact_run
from diagnostics.store.format import COARSE, TABLES
from diagnostics.store.read import open_run

ROOT = Path(__file__).parents[2]
_KEYS = ("step", "layer", "head", "parameter", "time_s", "message")
_WRITERS = ("attempt", "rank")
_README = ROOT / "diagnostics" / "store" / "README.md"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="module")
def closed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One attempt, closed in order, in many parts; a scalar appears in the middle of it."""
    root = tmp_path_factory.mktemp("closed")
    # So many parts to a merge that some are left as they were recorded.
    death = nursery.record(root / "run", root / "acks", steps=90, cadence={"fan_in": 10})
    assert death.code == 0, death.words
    return root / "run"


@pytest.fixture(scope="module")
def compacted(closed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, compacted."""
    run_dir = tmp_path_factory.mktemp("compacted") / "run"
    shutil.copytree(closed, run_dir)
    compact_run(run_dir)
    return run_dir


@pytest.fixture(scope="module")
def resumed(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three attempts: saved at step 20, killed after 30, resumed and killed after 40, resumed and closed at 60."""
    root = tmp_path_factory.mktemp("resumed")
    saved = {"state": str(root / "state"), "save_every": 20, "resume": True, "cadence": QUICK}
    for number, acks in enumerate((30, 15)):
        kill = {"signal": "SIGKILL", "after_acks": acks, "delay_s": 0.0}
        death = nursery.record(root / "run", root / f"acks-{number}", kill=kill, **saved)
        assert death.signal == 9, death.words
    death = nursery.record(root / "run", root / "acks", steps=60, **saved)
    assert death.code == 0, death.words
    return root / "run"


def by_pandas_folder(run_dir: Path, table: str) -> pa.Table:
    return _from_pandas(pd.read_parquet(run_dir / table, dtype_backend="pyarrow"))


def by_pandas_glob(run_dir: Path, table: str) -> pa.Table:
    parts = sorted((run_dir / table).glob("*.parquet"))
    return _from_pandas(pd.concat([pd.read_parquet(part, dtype_backend="pyarrow") for part in parts]))


def by_pyarrow_dataset(run_dir: Path, table: str) -> pa.Table:
    parts = sorted((run_dir / table).glob("*.parquet"))
    schema = pa.unify_schemas([pq.read_schema(part) for part in parts])
    return ds.dataset(run_dir / table, format="parquet", schema=schema).to_table()


def by_duckdb(run_dir: Path, table: str) -> pa.Table:
    query = f"select * from read_parquet('{run_dir}/{table}/*.parquet', union_by_name = true)"  # noqa: S608 - a path of ours
    relation = duckdb.sql(query)
    assert relation is not None
    return relation.to_arrow_table()


def by_polars(run_dir: Path, table: str) -> pa.Table:
    parts = sorted((run_dir / table).glob("*.parquet"))
    frames = [pl.scan_parquet(part) for part in parts]
    return pl.concat(frames, how="diagonal").collect().to_arrow()


TOOLS: dict[str, Callable[[Path, str], pa.Table]] = {
    "pandas, folder": by_pandas_folder,
    "pandas, glob": by_pandas_glob,
    "pyarrow": by_pyarrow_dataset,
    "duckdb": by_duckdb,
    "polars": by_polars,
}


def _from_pandas(frame: pd.DataFrame) -> pa.Table:
    return pa.Table.from_pandas(frame, preserve_index=False)


def _rows(table: pa.Table, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """Rows in an order of their own, whichever order a tool gave them."""
    names = columns or table.column_names
    rows = [{name: row.get(name) for name in names} for row in table.to_pylist()]
    return sorted(rows, key=lambda row: [str(row.get(key)) for key in _KEYS])


def _assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]], where: str) -> None:
    assert len(found) == len(expected), f"{where}: {len(found)} rows, not {len(expected)}"
    for left, right in zip(found, expected, strict=True):
        assert left.keys() == right.keys(), where
        for name, value in right.items():
            equal = (
                all(map(same, left[name], value)) and len(left[name]) == len(value)
                if isinstance(value, list)
                else same(left[name], value)
            )
            assert equal, f"{where}: {name} is {left[name]!r} in step {right['step']}, not {value!r}"


@pytest.mark.parametrize("merged", [False, True], ids=["as recorded", "merged"])
@pytest.mark.parametrize("table", TABLES)
def test_every_tool_sees_the_rows_that_open_run_shows(
    closed: Path,
    compacted: Path,
    table: str,
    merged: bool,  # noqa: FBT001 - a case
) -> None:
    run_dir = compacted if merged else closed
    parts = list((run_dir / table).glob("*.parquet"))
    expected = open_run(run_dir).table(table)
    if table == "events":
        assert (parts, expected.num_rows) == ([], 0)
        return
    assert (len(parts) == 1) == merged
    for tool, read in TOOLS.items():
        found = read(run_dir, table)
        # Tools that take a folder's columns from its first file see no column that came later.
        columns = expected.column_names
        if tool == "pandas, folder":
            columns = [name for name in columns if name in found.column_names]
            assert set(columns) >= {column.name for column in TABLES[table]}
        else:
            assert set(found.column_names) == set(columns), tool
        _assert_same(_rows(found, columns), _rows(expected, columns), f"{table} by {tool}")
    assert (table == "steps") == ("late" in expected.column_names)


@pytest.mark.parametrize("tool", ["pandas, glob", "pyarrow", "duckdb", "polars"])
def test_the_attempts_of_a_resumed_run_are_told_apart_by_a_column(resumed: Path, tool: str) -> None:
    for table in ("steps", "attention", "updates"):
        found = TOOLS[tool](resumed, table)
        rows = found.to_pylist()
        assert {row["attempt"] for row in rows} == {None, 2, 3}
        for attempt in (1, 2, 3):
            expected = open_run(resumed, attempt=attempt).table(table)
            own = [row for row in rows if (row["attempt"] or 1) == attempt]
            columns = expected.column_names
            assert not set(columns) & set(_WRITERS)
            _assert_same(
                _rows(pa.Table.from_pylist(own, schema=found.schema), columns),
                _rows(expected, columns),
                f"{table} of attempt {attempt} by {tool}",
            )


def test_the_later_attempts_rows_replace_the_earlier_ones_where_both_took_a_step(resumed: Path) -> None:
    whole = by_duckdb(resumed, "steps").to_pylist()
    latest: dict[int, dict[str, Any]] = {}
    for row in sorted(whole, key=lambda row: row["attempt"] or 1):
        # Everything that an earlier attempt has from the first step of a later one on is void.
        if row["step"] == min(r["step"] for r in whole if r["attempt"] == row["attempt"]):
            latest = {step: kept for step, kept in latest.items() if step < row["step"]}
        latest[row["step"]] = row
    shown = open_run(resumed).table("steps")
    assert shown.column("step").to_pylist() == sorted(latest)
    _assert_same(
        _rows(pa.Table.from_pylist(list(latest.values())), shown.column_names),
        _rows(shown),
        "the effective view",
    )


def _parts(run_dir: Path) -> list[Path]:
    return sorted(run_dir.rglob("*.parquet"))


@pytest.mark.parametrize("which", ["closed", "resumed"])
def test_every_column_of_every_part_says_its_unit_and_meaning(
    which: str, request: pytest.FixtureRequest
) -> None:
    run_dir: Path = request.getfixturevalue(which)
    kinds = {"raw": 0, "coarse": 0}
    for part in _parts(run_dir):
        schema = pq.read_schema(part)
        kinds["coarse" if COARSE in part.parts else "raw"] += 1
        for field in schema:
            metadata = field.metadata or {}
            where = f"{part.relative_to(run_dir)}: {field.name}"
            assert metadata.get(b"meaning"), f"{where} has no meaning"
            assert b"unit" in metadata, f"{where} has no unit, not even an empty one"
    assert all(kinds.values()), kinds


def test_a_merged_part_keeps_the_metadata_of_its_columns(compacted: Path) -> None:
    merged = [part for part in _parts(compacted) if re.search(r"m\d+\.parquet$", part.name)]
    assert {part.parent.name for part in merged} >= {"steps", "attention", "spectra", "updates"}
    assert any(COARSE in part.parts for part in merged)
    for part in merged:
        for field in pq.read_schema(part):
            assert (field.metadata or {}).get(b"meaning"), f"{part.name}: {field.name}"


def test_every_column_that_is_written_is_documented(closed: Path, resumed: Path) -> None:
    words = _README.read_text(encoding="utf-8")
    for run_dir in (closed, resumed):
        for part in _parts(run_dir):
            if COARSE in part.parts:
                continue  # named there by rule: x_min, x_max, ...
            table = part.parent.name
            section = words.split(f"**{table}**", 1)[1].split("\n**", 1)[0]
            for name in pq.read_schema(part).names:
                documented = f"| `{name}` |" in section or name in {"noisy", "late"} or f"`{name}`" in words
                assert documented, f"{table}.{name} is not in {_README.name}"
