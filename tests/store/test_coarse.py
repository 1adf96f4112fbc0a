"""Coarse tables: what a bucket holds, against plain Python, and what a writer keeps of a run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diagnostics.store.coarse.tables import (
    CoarseWriter,
    aggregate,
    coarse_schema,
    metrics_of,
    stored_resolutions,
)
from diagnostics.store.format import COARSE, SCHEMAS, PartName

Row = dict[str, Any]

NUMBERS = st.none() | st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1.7e308, -1.7e308, 0.1])


def arrow(table: str, rows: list[Row], *scalars: str) -> pa.Table:
    schema = SCHEMAS[table]
    for name in scalars:
        schema = schema.append(pa.field(name, pa.float64()))
    return pa.Table.from_pylist(rows, schema=schema)


def expected(rows: list[Row], keys: list[str], metric: str, resolution: int) -> dict[tuple[Any, ...], Row]:
    """The statistics of one metric, value by value."""
    found: dict[tuple[Any, ...], list[float | None]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        bucket = (row["step"] // resolution * resolution, *(row[key] for key in keys))
        found.setdefault(bucket, []).append(row.get(metric))
    answer = {}
    for bucket, values in found.items():
        told = [value for value in values if value is not None]
        finite = [value for value in told if math.isfinite(value)]
        answer[bucket] = {
            "min": min(finite, default=None),
            "max": max(finite, default=None),
            "mean": math.fsum(value / len(finite) for value in finite) if finite else None,
            "last": told[-1] if told else None,
            "count": len(finite),
            "nonfinite": len(told) - len(finite),
        }
    return answer


def alike(one: float | None, other: float | None, *, tolerance: float = 0.0) -> bool:
    if one is None or other is None:
        return one is other
    if math.isnan(one) or math.isnan(other):
        return math.isnan(one) and math.isnan(other)
    return one == other or abs(one - other) <= tolerance


def check(
    coarse: pa.Table, rows: list[Row], keys: list[str], metric: str, resolution: int, epsilon: float
) -> None:
    wanted = expected(rows, keys, metric, resolution)
    got = {tuple(row[key] for key in ["step", *keys]): row for row in coarse.to_pylist()}
    assert set(got) == set(wanted)
    assert coarse.num_rows == len(wanted)
    for bucket, statistics in wanted.items():
        for name, value in statistics.items():
            # A mean may be off by rounding, measured against the largest number that went in.
            largest = max(abs(statistics["min"] or 0.0), abs(statistics["max"] or 0.0))
            tolerance = epsilon * largest if name == "mean" else 0.0
            assert alike(got[bucket][f"{metric}_{name}"], value, tolerance=tolerance), (bucket, name)


@given(st.lists(st.tuples(st.integers(0, 600), NUMBERS), max_size=60))
@settings(deadline=None, max_examples=60)
def test_a_bucket_holds_what_its_values_say_one_by_one(pairs: list[tuple[int, float | None]]) -> None:
    rows = [{"step": step, "loss": value} for step, value in sorted(pairs, key=lambda pair: pair[0])]
    for resolution in (16, 256, 4096):
        check(aggregate("steps", arrow("steps", rows), resolution), rows, [], "loss", resolution, 1e-12)


@given(st.lists(st.tuples(st.integers(0, 600), NUMBERS), max_size=60))
@settings(deadline=None, max_examples=60)
def test_coarse_rows_of_coarse_rows_are_those_of_the_raw_ones(pairs: list[tuple[int, float | None]]) -> None:
    rows = [{"step": step, "loss": value} for step, value in sorted(pairs, key=lambda pair: pair[0])]
    fine = aggregate("steps", arrow("steps", rows), 16)
    check(aggregate("steps", fine, 256, from_resolution=16), rows, [], "loss", 256, 1e-12)
    for row in aggregate("steps", fine, 256, from_resolution=16).to_pylist():
        if row["loss_count"]:
            assert row["loss_min"] <= row["loss_mean"] <= row["loss_max"]


def test_each_head_has_buckets_of_its_own_whatever_order_rows_come_in() -> None:
    rng = np.random.default_rng(1)
    rows = [
        {
            "step": step, "layer": layer, "head": head, "rows": int(rng.integers(1, 99)),
            "entropy": float(np.float32(rng.standard_normal())),
        }
        for step in range(0, 100, 10) for layer in ("b", "a") for head in range(3)
    ]  # fmt: skip
    by_head = sorted(rows, key=lambda row: (row["layer"], row["head"], row["step"]))
    for order in (rows, by_head, rows[::-1]):
        coarse = aggregate("attention", arrow("attention", order), 16)
        check(coarse, rows, ["layer", "head"], "entropy", 16, 1e-6)
        check(coarse, rows, ["layer", "head"], "rows", 16, 1e-6)
        assert coarse["step"].to_pylist() == sorted(coarse["step"].to_pylist())


def test_two_parts_of_one_bucket_become_one() -> None:
    rows = [{"step": step, "parameter": "w", "ratio": float(step)} for step in range(16)]
    halves = [aggregate("updates", arrow("updates", half), 16) for half in (rows[:5], rows[5:])]
    whole = aggregate("updates", pa.concat_tables(halves), 16, from_resolution=16)
    assert whole.equals(aggregate("updates", arrow("updates", rows), 16))
    assert whole["ratio_mean"].to_pylist() == [7.5]


def test_only_metrics_at_hand_are_in_the_result() -> None:
    rows = arrow("attention", [{"step": 3, "layer": "a", "head": 0, "entropy": 2.0}])
    coarse = aggregate("attention", rows.select(["step", "layer", "head", "entropy"]), 16)
    assert coarse.column_names == [
        "step", "layer", "head",
        *(f"entropy_{name}" for name in ("min", "max", "mean", "last", "count", "nonfinite")),
    ]  # fmt: skip
    less = coarse.drop_columns(["entropy_count"])
    assert aggregate("attention", less, 256, from_resolution=16).column_names == ["step", "layer", "head"]


@pytest.mark.parametrize("table", ["steps", "attention", "spectra", "updates"])
def test_what_comes_out_has_the_columns_that_are_documented(table: str) -> None:
    scalars = ["reward", "reward_min", "x_nonfinite"] if table == "steps" else []
    row: Row = {"step": 20, "layer": "a", "head": 1, "parameter": "w", **dict.fromkeys(scalars, 1.0)}
    coarse = aggregate(table, arrow(table, [row], *scalars), 16)
    assert coarse.schema.equals(coarse_schema(table, scalars, resolution=16), check_metadata=True)
    again = aggregate(table, coarse, 4096, from_resolution=16)
    assert again.schema.equals(coarse_schema(table, scalars, resolution=4096), check_metadata=True)
    assert len(set(coarse.column_names)) == len(coarse.column_names)
    assert all(field.metadata[b"meaning"] for field in coarse.schema)
    assert aggregate(table, coarse.slice(0, 0), 256, from_resolution=16).num_rows == 0


def test_columns_keep_their_width_and_say_their_unit_and_span() -> None:
    attention = coarse_schema("attention", resolution=256)
    assert attention.field("entropy_mean").type == pa.float32()
    assert attention.field("rows_max").type == pa.int32()
    assert attention.field("rows_mean").type == pa.float32()
    assert attention.field("entropy_min").metadata[b"unit"] == b"nats"
    assert b"over 256 steps" in attention.field("entropy_min").metadata[b"meaning"]
    steps = coarse_schema("steps", ["reward"])
    assert steps.field("loss_mean").type == steps.field("reward_last").type == pa.float64()
    assert "measured_min" not in steps.names
    assert metrics_of("spectra") == [
        "sigma1", "frobenius", "sec_1", "sec_4", "sec_10", "stable_rank", "effective_rank",
    ]  # fmt: skip


def stored(run: Path, table: str, resolution: int) -> pa.Table:
    folder = run / COARSE / str(resolution) / table
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    parts = [pq.ParquetFile(path).read() for path in paths]
    for path, part in zip(paths, parts, strict=True):
        name = PartName.parse(path.name)
        assert name is not None
        starts = part["step"].to_pylist()
        assert (name.first_step, name.last_step) == (min(starts), max(starts) + resolution - 1)
    return pa.concat_tables([*parts, coarse_schema(table).empty_table()], promote_options="default")


def fed(run: Path, table: str, rows: list[Row], chunks: list[int], *scalars: str, **options: Any) -> None:
    """Hands rows to a writer in flushes that end at these steps."""
    writer = CoarseWriter(run, **{"attempt": 1, "rank": 0, "every": 1, **options})
    before = -1
    for number, end in enumerate(chunks):
        chunk = [row for row in rows if before < row["step"] <= end]
        names = [name for name in scalars if any(name in row for row in chunk)]
        writer.take(table, arrow(table, chunk, *names))
        writer.write(number)
        before = end


@given(st.lists(st.integers(0, 699), min_size=1, max_size=12, unique=True))
@settings(deadline=None, max_examples=20)
def test_however_the_flushes_fall_the_complete_buckets_are_those_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, ends: list[int]
) -> None:
    run = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(2)
    rows = [{"step": step, "loss": float(rng.standard_normal())} for step in range(700)]
    fed(run, "steps", rows, [*sorted(ends), 699])
    for resolution, last in ((16, 688), (256, 512), (4096, 0)):
        whole = [row for row in rows if row["step"] < last]
        check(stored(run, "steps", resolution), whole, [], "loss", resolution, 1e-12)


def test_a_spike_of_one_step_is_in_every_resolution(tmp_path: Path) -> None:
    rows: list[Row] = [{"step": step, "loss": 1.0} for step in range(8192)]
    rows[5003]["loss"] = 1e6
    fed(tmp_path, "steps", rows, [999, 8191])
    for resolution in (16, 256, 4096):
        coarse = stored(tmp_path, "steps", resolution)
        spiked = [row["step"] for row in coarse.to_pylist() if row["loss_max"] == 1e6]
        assert spiked == [5003 // resolution * resolution]
        assert coarse.num_rows == 8192 // resolution


def test_a_scalar_that_comes_later_has_columns_from_then_on(tmp_path: Path) -> None:
    rows: list[Row] = [{"step": step, "loss": 1.0} for step in range(48)]
    rows[20]["reward"] = 2.5
    fed(tmp_path, "steps", rows, [15, 31, 47], "reward")
    coarse = stored(tmp_path, "steps", 16)
    assert coarse["reward_count"].to_pylist() == [None, 1, 0]
    assert coarse["reward_last"].to_pylist() == [None, 2.5, None]
    last = max((tmp_path / COARSE / "16" / "steps").iterdir())
    assert "reward_mean" in pq.read_schema(last).names


def test_what_began_before_the_attempt_is_not_stored(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1.0} for step in range(100, 600)]
    fed(tmp_path, "steps", rows, [300, 599], attempt=2, rank=3)
    assert stored(tmp_path, "steps", 16)["step"].to_pylist() == list(range(112, 592, 16))
    assert stored(tmp_path, "steps", 256)["step"].to_pylist() == [256]
    names = [PartName.parse(path.name) for path in tmp_path.rglob("*.parquet")]
    assert {(name.attempt, name.rank) for name in names if name is not None} == {(2, 3)}
    assert set(stored(tmp_path, "steps", 16)["attempt"].to_pylist()) == {2}
    assert set(stored(tmp_path, "steps", 16)["rank"].to_pylist()) == {3}


def test_measured_tables_are_stored_only_where_that_saves_something(tmp_path: Path) -> None:
    assert stored_resolutions("steps", 1000) == (16, 256, 4096)
    assert stored_resolutions("attention", 4) == (16, 256, 4096)
    assert stored_resolutions("attention", 5) == (256, 4096)
    assert stored_resolutions("updates", 1025) == ()
    rows: list[Row] = [{"step": step, "parameter": "w", "ratio": float(step)} for step in range(0, 1000, 10)]
    fed(tmp_path, "updates", rows, [500, 990], every=10)
    assert stored(tmp_path, "updates", 16).num_rows == 0
    check(
        stored(tmp_path, "updates", 256),
        [row for row in rows if row["step"] < 768],
        ["parameter"],
        "ratio",
        256,
        1e-6,
    )


def test_buckets_of_a_file_that_failed_are_written_with_the_next(tmp_path: Path) -> None:
    writer = CoarseWriter(tmp_path, attempt=1, rank=0, every=1)
    writer.take("steps", arrow("steps", [{"step": step, "loss": 1.0} for step in range(20)]))
    (tmp_path / COARSE).write_text("in the way")
    with pytest.raises(OSError, match="coarse"):
        writer.write(0)
    (tmp_path / COARSE).unlink()
    writer.take("steps", arrow("steps", [{"step": step, "loss": 1.0} for step in range(20, 40)]))
    writer.write(1)
    assert stored(tmp_path, "steps", 16)["step"].to_pylist() == [0, 16]
    writer.write(2)
    assert len(list((tmp_path / COARSE / "16" / "steps").iterdir())) == 1


def test_columns_that_say_who_wrote_a_row_are_no_metrics() -> None:
    rows = arrow("steps", [{"step": 0, "loss": 1.0}])
    rows = rows.append_column("attempt", pa.array([2], pa.int16()))
    assert "attempt_min" not in aggregate("steps", rows, 16).column_names
    scalar = arrow("steps", [{"step": 0, "loss": 1.0, "rank": 3.0}], "rank")
    assert aggregate("steps", scalar, 16)["rank_max"].to_pylist() == [3.0]
