"""What the pages read is what `open_run` reads, however the run grew meanwhile, and no more of it than is new."""

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic import HEADS, LAYERS, manifest, write_run, write_table

from diagnostics.app.data import Reader
from diagnostics.errors import DamagedDataWarning
from diagnostics.store.compact import compact_run
from diagnostics.store.format import PartName
from diagnostics.store.manifest import write_manifest
from diagnostics.store.read import open_run
from diagnostics.store.reading.cursor import Cursor, News


def attention_rows(*steps: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "layer": layer, "head": head, "entropy": 1.0 + step}
        for step in steps
        for layer in LAYERS
        for head in range(HEADS)
    ]


def resume(run_dir: Path, table: str, rows: list[dict[str, Any]], attempt: int, number: int) -> None:
    """Adds a part of a later attempt."""
    path = write_table(run_dir, table, rows, number=number)
    steps = [row["step"] for row in rows]
    path.rename(path.with_name(str(PartName(min(steps), max(steps), number, attempt=attempt))))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many rows each look at a run's cursors gave."""
    seen: list[int] = []
    whole = Cursor.read

    def counted(cursor: Cursor) -> News:
        news = whole(cursor)
        seen.append(news.rows.num_rows)
        return news

    monkeypatch.setattr(Cursor, "read", counted)
    return seen


def test_an_unchanged_run_is_read_once(tmp_path: Path, read: list[int]) -> None:
    run_dir = write_run(tmp_path)
    reader = Reader()
    first = reader.table(run_dir, "attention")
    assert reader.table(run_dir, "attention") is first
    # 10 measured steps of 2 layers of 2 heads.
    assert read == [40, 0]


def test_of_a_table_that_grew_only_the_new_rows_are_read(tmp_path: Path, read: list[int]) -> None:
    run_dir = write_run(tmp_path, steps=100)
    reader = Reader()
    reader.table(run_dir, "attention")
    write_table(run_dir, "attention", attention_rows(100, 110), number=1)
    grown = reader.table(run_dir, "attention")
    assert read == [40, 8]
    pd.testing.assert_frame_equal(grown, open_run(run_dir).attention())


def test_merged_parts_are_no_news(tmp_path: Path, read: list[int]) -> None:
    run_dir = write_run(tmp_path, steps=50)
    write_table(run_dir, "attention", attention_rows(50, 60), number=1)
    reader = Reader()
    before = reader.table(run_dir, "attention")
    compact_run(run_dir)
    assert len(list((run_dir / "attention").iterdir())) == 1
    assert reader.table(run_dir, "attention") is before
    assert read == [28, 0]


def test_steps_that_a_new_attempt_computes_again_replace_the_old_ones(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=50)
    reader = Reader()
    for table in ("steps", "attention"):
        reader.table(run_dir, table)
    steps = [{"step": step, "loss": 9.0, "measured": step % 10 == 0} for step in range(25, 35)]
    resume(run_dir, "steps", steps, attempt=2, number=1)
    resume(run_dir, "attention", attention_rows(30), attempt=2, number=1)
    for table in ("steps", "attention"):
        shown = reader.table(run_dir, table).drop(columns="loss_not_finite", errors="ignore")
        pd.testing.assert_frame_equal(shown, open_run(run_dir).table(table).to_pandas())
    losses = reader.table(run_dir, "steps").set_index("step")["loss"]
    assert losses.index[-1] == 34
    assert (losses.loc[25:] == 9.0).all()
    assert (losses.loc[:24] != 9.0).all()


def test_a_run_recorded_anew_at_the_same_path_is_read_anew(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=100)
    reader = Reader()
    healthy = reader.curves(run_dir).entropy["value"].min()
    shutil.rmtree(run_dir)
    write_run(tmp_path, steps=100, collapse=True)
    assert reader.curves(run_dir).entropy["value"].min() < healthy


def test_a_run_that_goes_on_has_longer_curves(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    reader = Reader()
    before = reader.curves(run_dir)
    assert reader.curves(run_dir) is before
    write_table(run_dir, "steps", [{"step": 100, "loss": 7.0, "measured": False}], number=1)
    write_manifest(run_dir, manifest("run", steps=101))
    after = reader.curves(run_dir)
    assert (len(before.loss), len(after.loss)) == (100, 101)
    assert after.loss["value"].iloc[-1] == 7.0


def test_a_nan_loss_is_known_from_a_null_one(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=2)
    write_table(
        run_dir,
        "steps",
        [{"step": 2, "loss": math.nan, "measured": False}, {"step": 3, "loss": None, "measured": False}],
        number=1,
    )
    assert Reader().table(run_dir, "steps")["loss_not_finite"].tolist() == [False, False, True, False]


def test_the_spectrum_of_a_head_is_that_of_the_table(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=30, collapse=True)
    rows: list[dict[str, Any]] = [
        {"step": 30, "sigma1": None, "singular_values": None},
        {"step": 40, "sigma1": 3.0, "singular_values": [3.0, 1.0]},
    ]
    write_table(run_dir, "spectra", [{**row, "layer": LAYERS[1], "head": 1} for row in rows], number=1)
    spectrum = Reader().spectrum(str(run_dir), LAYERS[1], 1)
    rows_of_head = open_run(run_dir).spectra()
    rows_of_head = rows_of_head[(rows_of_head["layer"] == LAYERS[1]) & (rows_of_head["head"] == 1)]
    assert spectrum.index.tolist() == rows_of_head["step"].tolist() == [0, 10, 20, 30, 40]
    assert spectrum.columns.tolist() == [1, 2, 3, 4]
    assert spectrum.loc[20].tolist() == rows_of_head["singular_values"].iloc[2].tolist()
    assert spectrum.loc[30].isna().all()
    assert spectrum.loc[40].dropna().tolist() == [3.0, 1.0]


def test_a_damaged_part_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=50)
    broken = write_table(run_dir, "attention", attention_rows(50), number=1)
    broken.write_bytes(broken.read_bytes()[:100])
    reader = Reader()
    with pytest.warns(DamagedDataWarning, match=broken.name):
        frame = reader.table(run_dir, "attention")
    assert sorted(frame["step"].unique()) == [0, 10, 20, 30, 40]
    assert list(reader.damaged(run_dir)) == [f"attention/{broken.name}"]


def test_what_was_not_asked_for_lately_is_forgotten(tmp_path: Path) -> None:
    reader = Reader(most_kept=2)
    for name in ("a", "b", "c"):
        reader.table(write_run(tmp_path, name, steps=2), "steps")
    assert len(reader._following) == 2


def test_overhead_is_the_share_of_the_wall_time_between_first_and_last_step(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=0)
    reader = Reader()
    assert reader.overhead(run_dir) is None
    rows = [
        {"step": step, "time_s": time_s, "overhead_s": overhead_s, "measured": True}
        for step, (time_s, overhead_s) in enumerate(((100.0, 9.0), (101.0, 0.1), (104.0, 0.3)))
    ]
    write_table(run_dir, "steps", rows[:1])
    assert reader.overhead(run_dir) is None
    write_table(run_dir, "steps", rows[1:], number=1)
    # What the first step cost lies before the first time.
    assert reader.overhead(run_dir) == pytest.approx((0.4, 4.0))
