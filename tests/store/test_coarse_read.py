"""`Run.coarse` against the same buckets computed from the raw rows with plain numpy in float64."""

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from scripted_writer import ScriptedWriter, merge_some, say
from synthetic import HEADS, LAYERS, write_run, write_table

from diagnostics.errors import DamagedDataWarning, DiagnosticsError
from diagnostics.store import write
from diagnostics.store.coarse.tables import KEYS, STATISTICS
from diagnostics.store.format import COARSE
from diagnostics.store.read import Run, open_run


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every complete bucket is written at the next flush, so that few rows make coarse tables."""
    monkeypatch.setattr(write, "_LEAST_BUCKETS", 1)


def by_hand(values: list[float | None]) -> dict[str, Any]:
    """Statistics of one metric over one bucket."""
    told = [value for value in values if value is not None]
    finite = np.array([value for value in told if math.isfinite(value)], np.float64)
    return {
        "min": finite.min() if len(finite) else None,
        "max": finite.max() if len(finite) else None,
        "mean": finite.mean() if len(finite) else None,
        "last": told[-1] if told else None,
        "count": len(finite),
        "nonfinite": len(told) - len(finite),
    }


def check(run: Run, table: str, resolution: int, *metrics: str) -> None:
    """Compares every bucket with the raw rows."""
    values: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in run.table(table).to_pylist():
        values[row["step"] // resolution * resolution, *(row[key] for key in KEYS[table])].append(row)
    frame = run.coarse(table, resolution)
    assert list(frame["step"]) == sorted(frame["step"])
    keys = list(zip(frame["step"], *(frame[key] for key in KEYS[table]), strict=True))
    assert sorted(keys) == sorted(values)
    for metric in metrics:
        columns = {name: frame[f"{metric}_{name}"].tolist() for name in STATISTICS}
        for index, key in enumerate(keys):
            for statistic, value in by_hand([row.get(metric) for row in values[key]]).items():
                got = columns[statistic][index]
                if value is None or math.isnan(value):
                    assert pd.isna(got), (key, metric, statistic)
                else:
                    # A coarse column of a float32 metric holds float32.
                    assert got == pytest.approx(value, rel=3e-7, abs=1e-7), (key, metric, statistic)


def check_all(run: Run, resolutions: tuple[int, ...] = (16, 256)) -> None:
    for resolution in resolutions:
        check(run, "steps", resolution, "loss", "lr", "grad_norm")  # never, now and then, always null
        check(run, "attention", resolution, "entropy", "rank_frac")
        check(run, "updates", resolution, "ratio")


def record(writer: ScriptedWriter, first: int, last: int, *, every: int = 4, flush_every: int = 50) -> None:
    for step in range(first, last):
        writer.step(step, measured=step % every == 0)
        if step % flush_every == flush_every - 1:
            writer.flush()


def stored(run_dir: Path, resolution: int, table: str) -> list[Path]:
    return sorted((run_dir / COARSE / str(resolution) / table).glob("*.parquet"))


def test_a_live_run_with_open_buckets(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir, every=4)
    writer = ScriptedWriter(run_dir, every=4)
    run = open_run(run_dir)
    assert run.coarse("steps", 16).empty
    for first, last in ((0, 7), (7, 300), (300, 523)):
        record(writer, first, last)
        check_all(run)
    assert stored(run_dir, 16, "steps")
    assert stored(run_dir, 256, "attention")
    merge_some(run_dir, 4)
    check_all(run)
    writer.die()
    check_all(run)


def test_a_run_that_was_resumed_inside_a_bucket(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir, every=4)
    writer = ScriptedWriter(run_dir, every=4)
    record(writer, 0, 420)
    writer.die()
    writer = writer.resumed(2, every=4)
    run = open_run(run_dir)
    check_all(run)
    record(writer, 233, 380)
    check_all(run)
    writer.die()
    writer = writer.resumed(3, every=4)
    record(writer, 300, 700)
    check_all(run)
    merge_some(run_dir, 8)
    check_all(run)
    check_all(open_run(run_dir, attempt=1))
    check_all(open_run(run_dir, attempt=2))
    writer.die()


def test_a_run_without_coarse_tables(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=600, every=4, schema_version=1)
    run = open_run(run_dir)
    check_all(run, (16, 256, 4096))
    assert not (run_dir / COARSE).exists()


def test_values_that_are_not_finite_and_scalars_that_come_late(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir, every=4)
    writer = ScriptedWriter(run_dir, every=4)
    values = {20: math.nan, 21: math.inf, 40: -math.inf, 47: 1.5, 60: 2.5}
    for step in range(80):
        writer.step(step, scalars={"extra": values.get(step, 0.25)} if step >= 20 else None)
        if step in (18, 50):
            writer.flush()
    run = open_run(run_dir)
    check(run, "steps", 16, "extra")
    check(run, "steps", 256, "extra")
    frame = run.coarse("steps", 16, ["step", "extra_count", "extra_max"], start_step=0, end_step=5)
    assert frame.to_dict("list") == {
        "step": [0],
        "extra_count": [0],
        "extra_max": [pytest.approx(math.nan, nan_ok=True)],
    }
    writer.die()


def test_a_damaged_coarse_file_is_made_good_from_the_rows(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir, every=4)
    writer = ScriptedWriter(run_dir, every=4)
    record(writer, 0, 400)
    damaged = stored(run_dir, 16, "steps")[2]
    damaged.write_bytes(damaged.read_bytes()[:100])
    run = open_run(run_dir)
    with pytest.warns(DamagedDataWarning, match="coarse/16/steps"):
        check(run, "steps", 16, "loss")
    assert list(run.damaged) == [str(damaged.relative_to(run_dir))]
    # Merged past it, the range of the merged file says more than is in it.
    merge_some(run_dir, 2)
    check(run, "steps", 16, "loss")
    check(run, "steps", 256, "loss")
    writer.die()


def test_of_a_bucket_that_was_written_twice_the_later_one_counts(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir, every=4)
    writer = ScriptedWriter(run_dir, every=4)
    record(writer, 0, 100)
    part = stored(run_dir, 16, "steps")[0]
    rows = pq.read_table(part)
    wrong = rows.set_column(rows.column_names.index("loss_max"), "loss_max", [[99.0] * rows.num_rows])
    pq.write_table(wrong, part.with_name(part.name.replace("-000000.", "-000777.")))
    frame = open_run(run_dir).coarse("steps", 16)
    assert frame["step"].is_unique
    assert list(frame["loss_max"][: rows.num_rows]) == [99.0] * rows.num_rows
    writer.die()


def test_ranges_columns_and_keys_choose_buckets(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    say(run_dir, every=4)
    writer = ScriptedWriter(run_dir, every=4)
    record(writer, 0, 200)
    run = open_run(run_dir)
    assert list(run.coarse("steps", 16, ["step"], start_step=20, end_step=47)["step"]) == [16, 32]
    assert list(run.coarse("steps", 16, ["step"], start_step=190)["step"]) == [176, 192]
    whole = run.coarse("attention", 16)
    one = run.coarse("attention", 16, ["entropy_mean", "step"], layer=LAYERS[1], head=1, start_step=64)
    assert list(one.columns) == ["entropy_mean", "step"]
    chosen = whole[(whole["layer"] == LAYERS[1]) & (whole["head"] == 1) & (whole["step"] >= 64)]
    assert one["entropy_mean"].tolist() == chosen["entropy_mean"].tolist()
    assert run.coarse("attention", 16, layer="nowhere").empty
    assert len(whole) == len(LAYERS) * HEADS * 13
    writer.die()


def test_what_there_is_no_coarse_table_of_is_refused_in_words(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, steps=40))
    for arguments, message in (
        (("events", 16), "table 'events' has no coarse tables; steps, attention"),
        (("loss", 16), "there is no table 'loss'"),
        (("steps", 10), "there is no resolution 10; the resolutions are 16, 256, 4096 steps"),
        (("steps", 16, []), "asks for nothing"),
        (("steps", 16, ["loss"]), "no column 'loss'; they have step, and of each of time_s, loss"),
        (("steps", 16, ["los_max"]), "no column 'los_max'"),
        (("attention", 16, ["layer_max"]), "no column 'layer_max'"),
    ):
        with pytest.raises(DiagnosticsError, match=message):
            run.coarse(*arguments)
    with pytest.raises(DiagnosticsError, match="table 'steps' has no column 'layer'"):
        run.coarse("steps", 16, layer="x")


@pytest.mark.parametrize(
    ("steps", "every", "points", "of_steps", "of_attention"),
    [(100, 10, 200, None, None), (1000, 10, 200, 16, None), (1000, 10, 50, 256, 256), (1000, 10, 70, 16, 16), (10_000, 10, 50, 256, 256),
     (1_000_000, 1, 4000, 256, 256), (10**9, 1, 10, 4096, 4096)],
)  # fmt: skip
def test_the_resolution_is_the_finest_that_fits_into_a_picture(
    steps: int, every: int, points: int, of_steps: int | None, of_attention: int | None, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    say(run_dir, every=every)
    last = (steps - 1) // every * every
    for table, end in (("steps", steps - 1), ("attention", last)):
        key = {"layer": "a", "head": 0} if table == "attention" else {}
        write_table(run_dir, table, [{"step": 0, **key}, {"step": end, **key}])
    run = open_run(run_dir)
    assert run.resolution_for(points) == of_steps
    assert run.resolution_for(points, "attention") == of_attention
    with pytest.raises(DiagnosticsError, match="points is 0"):
        run.resolution_for(0)
