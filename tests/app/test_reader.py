"""What the pages read is what `open_run` reads, however the run grew meanwhile."""

import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from synthetic import HEADS, LAYERS, manifest, write_run, write_table

from diagnostics.app import browser
from diagnostics.app.data import Reader
from diagnostics.errors import DamagedDataWarning
from diagnostics.store.manifest import write_manifest
from diagnostics.store.read import Run, open_run


def attention_rows(*steps: int) -> list[dict[str, Any]]:
    return [
        {"step": step, "layer": layer, "head": head, "entropy": 1.0 + step}
        for step in steps
        for layer in LAYERS
        for head in range(HEADS)
    ]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """Every read that reaches the run's files: table and first step asked for."""
    seen: list[tuple[str, int | None]] = []
    whole = Run.table

    def counted(
        run: Run, name: str, columns: Any = None, start_step: int | None = None, end_step: int | None = None
    ) -> Any:
        seen.append((name, start_step))
        return whole(run, name, columns, start_step, end_step)

    monkeypatch.setattr(Run, "table", counted)
    return seen


def test_an_unchanged_run_is_read_once(tmp_path: Path, reads: list[tuple[str, int | None]]) -> None:
    run_dir = write_run(tmp_path)
    reader = Reader()
    first = reader.table(run_dir, "attention")
    assert reader.table(run_dir, "attention") is first
    assert reads == [("attention", None)]


def test_a_table_that_grew_is_read_from_its_first_new_step(
    tmp_path: Path, reads: list[tuple[str, int | None]]
) -> None:
    run_dir = write_run(tmp_path, steps=100)
    reader = Reader()
    reader.table(run_dir, "attention")
    write_table(run_dir, "attention", attention_rows(100, 110), number=1)
    grown = reader.table(run_dir, "attention")
    assert reads == [("attention", None), ("attention", 91)]
    pd.testing.assert_frame_equal(grown, open_run(run_dir).attention())


def test_a_part_that_reaches_back_is_read_with_everything(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=50)
    reader = Reader()
    reader.table(run_dir, "attention")
    write_table(run_dir, "attention", attention_rows(35), number=1)
    pd.testing.assert_frame_equal(reader.table(run_dir, "attention"), open_run(run_dir).attention())


def test_merged_parts_are_read_anew(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=50)
    reader = Reader()
    before = reader.table(run_dir, "attention")
    part = next((run_dir / "attention").iterdir())
    part.rename(part.with_name(part.name.replace("-000000.", "-000009.")))
    after = reader.table(run_dir, "attention")
    assert after is not before
    pd.testing.assert_frame_equal(after, before)


def test_a_run_recorded_anew_at_the_same_path_is_read_anew(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=100)
    reader = Reader()
    healthy = reader.curves(run_dir).entropy["value"].min()
    shutil.rmtree(run_dir)
    write_run(tmp_path, steps=100, collapse=True)
    assert reader.curves(run_dir).entropy["value"].min() < healthy


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
    write_table(
        run_dir,
        "spectra",
        [{"step": 30, "layer": LAYERS[1], "head": 1, "sigma1": None, "singular_values": None}],
        number=1,
    )
    spectrum = Reader().spectrum(run_dir, LAYERS[1], 1)
    rows = open_run(run_dir).spectra()
    rows = rows[(rows["layer"] == LAYERS[1]) & (rows["head"] == 1)]
    assert spectrum.index.tolist() == rows["step"].tolist() == [0, 10, 20, 30]
    assert spectrum.columns.tolist() == [1, 2, 3, 4]
    assert spectrum.loc[20].tolist() == rows["singular_values"].iloc[2].tolist()
    assert spectrum.loc[30].isna().all()


def test_a_damaged_part_is_named_and_the_rest_is_read(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, steps=50)
    broken = write_table(run_dir, "attention", attention_rows(50), number=1)
    broken.write_bytes(broken.read_bytes()[:100])
    reader = Reader()
    with pytest.warns(DamagedDataWarning, match=broken.name):
        frame = reader.table(run_dir, "attention")
    assert sorted(frame["step"].unique()) == [0, 10, 20, 30, 40]
    assert list(reader.damaged(run_dir)) == [f"attention/{broken.name}"]


def test_a_run_that_ended_is_digested_once_and_its_tables_are_not_kept(
    tmp_path: Path, reads: list[tuple[str, int | None]]
) -> None:
    run_dir = write_run(tmp_path, collapse=True)
    reader = Reader()
    assert not reader.has_digest(run_dir)
    digest = reader.digest(run_dir, live=False)
    assert reader.has_digest(run_dir)
    # Of 100 steps, step 90 is the last measured one; from 30 % on entropy falls linearly from 3.52 by 3.5.
    assert digest.lowest_entropy == pytest.approx(3.52 - 3.5 * (90 / 99 - 0.3) / 0.7)
    assert digest.last_loss == open_run(run_dir).steps()["loss"].iloc[-1]
    assert digest.highest_sec == pytest.approx(open_run(run_dir).spectra()["sec_1"].max())
    count = len(reads)
    assert reader.digest(run_dir, live=False) is digest
    assert len(reads) == count
    assert not reader._kept


def test_a_run_that_goes_on_is_digested_again(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path)
    reader = Reader()
    reader.digest(run_dir, live=False)
    write_table(run_dir, "steps", [{"step": 100, "loss": 7.0, "measured": False}], number=1)
    write_manifest(run_dir, manifest("run", steps=101))
    assert not reader.has_digest(run_dir)
    assert reader.digest(run_dir, live=False).last_loss == 7.0


def test_runs_beyond_the_budget_of_one_refresh_are_listed_unjudged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        write_run(tmp_path, name)
    reader = Reader()
    monkeypatch.setattr(browser, "JUDGING_BUDGET_S", -1.0)
    rows = browser.run_rows(tmp_path, reader)
    assert [(row["status"], row["lowest entropy"]) for row in rows] == [("…", None)] * 2
    monkeypatch.setattr(browser, "JUDGING_BUDGET_S", 60.0)
    assert all(row["lowest entropy"] is not None for row in browser.run_rows(tmp_path, reader))


def test_what_was_not_asked_for_lately_is_forgotten(tmp_path: Path) -> None:
    reader = Reader(most_kept=2)
    for name in ("a", "b", "c"):
        reader.table(write_run(tmp_path, name, steps=2), "steps")
    assert len(reader._kept) == 2
