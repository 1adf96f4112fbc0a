"""Of a long run coarse rows are drawn, and nothing that happened in a single step is lost in them."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from big_runs import BigRun, write_big_run
from synthetic import manifest, write_run, write_table

from diagnostics.app import data, series
from diagnostics.app.data import Reader
from diagnostics.app.decimate import MOST_POINTS
from diagnostics.app.head_charts import HEAD_METRICS, all_heads
from diagnostics.app.head_map import MOST_COLUMNS, heads_over_steps_figure
from diagnostics.app.judging import judge_apart, judged_at_once, judged_unasked
from diagnostics.app.series import most_steps, shortened, spliced, whole_buckets
from diagnostics.app.step_charts import overview_figure
from diagnostics.app.summary import resumes
from diagnostics.report import assess
from diagnostics.store.manifest import read_manifest, write_manifest
from diagnostics.store.read import Run, open_run

ENTROPY = HEAD_METRICS[0]
STEPS, EVERY = 20_000, 5


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> BigRun:
    # Few heads keep the test quick; 20,000 steps are more than are drawn one by one.
    path = tmp_path_factory.mktemp("runs") / "big"
    return write_big_run(path, steps=STEPS, every=EVERY, layers=2, heads=2, file_bytes=100_000)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the run were one that no picture holds in full: at most a thousand steps are read of any table."""
    monkeypatch.setattr(series, "_MOST_STEPS", 1000)


@pytest.mark.usefixtures("narrow")
def test_curves_of_a_long_run_enclose_every_step(big: BigRun) -> None:
    reader = Reader()
    curves = reader.curves(big.path)
    assert curves.resolution == 256
    steps = open_run(big.path).steps()
    buckets = steps.groupby(steps["step"] // 256 * 256)["loss"]
    assert curves.loss["step"].tolist() == buckets.min().index.tolist()
    np.testing.assert_allclose(curves.loss["low"], buckets.min())
    np.testing.assert_allclose(curves.loss["high"], buckets.max())
    np.testing.assert_allclose(curves.loss["value"], buckets.mean())
    attention = open_run(big.path).attention(["step", "entropy", "max_logit"])
    by_step = attention.groupby("step").agg({"entropy": "min", "max_logit": "max"})
    for curve, column in ((curves.entropy, "entropy"), (curves.logit, "max_logit")):
        bucket = by_step[column].groupby(by_step.index // 256 * 256)
        assert (curve["low"].to_numpy() <= bucket.min().to_numpy()).all()
        assert (curve["high"].to_numpy() >= bucket.max().to_numpy()).all()
    np.testing.assert_allclose(
        curves.entropy["low"], by_step["entropy"].groupby(by_step.index // 256 * 256).min()
    )


@pytest.mark.usefixtures("narrow")
def test_a_spike_of_one_step_is_in_the_picture_and_names_its_head(big: BigRun) -> None:
    curves = Reader().curves(big.path)
    step, loss = big.loss_spike
    at = curves.loss.loc[curves.loss["high"].idxmax()]
    assert at["high"] == loss
    assert at["step"] == step // 256 * 256
    layer, head, step, entropy = big.entropy_dip
    at = curves.entropy.loc[curves.entropy["low"].idxmin()]
    assert at["low"] == entropy
    assert at["step"] == step // 256 * 256
    assert at["where"] == f"{layer} head {head}"
    figure = overview_figure(curves)
    bands = {one.name: one for one in figure.data if str(one.name).endswith("lowest to highest")}
    assert np.nanmax(bands["loss, lowest to highest"].y) == loss
    assert np.nanmin(bands["lowest entropy, lowest to highest"].y) == entropy
    assert all(len(one.x) <= 2 * MOST_POINTS + 2 for one in figure.data)


@pytest.mark.usefixtures("narrow")
def test_zooming_in_gives_single_steps(big: BigRun) -> None:
    reader = Reader()
    step, loss = big.loss_spike
    curves = reader.curves(big.path, (step - 100, step + 100))
    inside = curves.loss[(curves.loss["step"] >= step - 100) & (curves.loss["step"] <= step + 100)]
    assert inside["step"].tolist() == list(range(step - 100, step + 101))
    assert inside.set_index("step").loc[step, "value"] == loss
    raw = open_run(big.path).steps(["step", "loss"], step - 100, step + 100)
    np.testing.assert_allclose(inside["value"], raw["loss"])
    # Around it the run is as before, and no step is there twice.
    assert curves.loss["step"].is_monotonic_increasing
    assert curves.loss["step"].is_unique
    assert curves.loss["step"].iloc[0] == 0
    assert curves.loss["step"].iloc[-1] == (STEPS - 1) // 256 * 256


@pytest.mark.usefixtures("narrow")
def test_a_rough_picture_holds_the_spike_too_and_reads_no_single_step(
    big: BigRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "ROUGH_POINTS", 10)
    reader = Reader()
    assert reader.refinable(big.path)
    # A whole number of coarse buckets: 4 of 4096 steps. The rest waits for the finer picture.
    rough = reader.curves(big.path, most=10)
    assert rough.loss["step"].tolist() == [0, 4096, 8192, 12288]
    assert rough.loss["high"].max() == big.loss_spike[1]
    assert rough.entropy["low"].min() == big.entropy_dip[3]
    reader.curves(big.path)
    assert not reader.refinable(big.path)


@pytest.mark.usefixtures("narrow")
def test_one_layer_is_read_without_the_others(big: BigRun) -> None:
    layer, head, step, entropy = big.entropy_dip
    rows, resolution = Reader().series(big.path, "attention", ("entropy",), layer=layer)
    assert set(rows["layer"]) == {layer}
    assert resolution == 256
    lowest = rows.loc[rows["entropy_low"].idxmin()]
    assert (lowest["head"], lowest["entropy_low"]) == (head, entropy)
    part, single = Reader().series(
        big.path, "attention", ("entropy",), layer=layer, span=(step - 50, step + 50)
    )
    assert single == 1
    raw = open_run(big.path).attention(None, step - 50, step + 50, layer=layer)
    np.testing.assert_array_equal(part["entropy"], raw["entropy"])


@pytest.mark.usefixtures("narrow")
def test_of_a_long_run_that_goes_on_only_the_last_buckets_are_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_big_run(tmp_path / "live", steps=STEPS, every=EVERY, layers=1, heads=1)
    reader = Reader()
    before = reader.curves(run.path)
    asked: list[int | None] = []
    whole = Run.coarse

    def counted(
        self: Run,
        table: str,
        resolution: int,
        columns: list[str] | None = None,
        start_step: int | None = None,
        end_step: int | None = None,
        **keys: Any,
    ) -> pd.DataFrame:
        asked.append(start_step)
        return whole(self, table, resolution, columns, start_step, end_step, **keys)

    monkeypatch.setattr(Run, "coarse", counted)
    new = [{"step": step, "loss": 77.0, "measured": False} for step in range(STEPS, STEPS + 300)]
    write_table(run.path, "steps", new, number=5000)
    write_manifest(run.path, {**read_manifest(run.path), "steps": STEPS + 300})
    after = reader.curves(run.path)
    last = (STEPS - 1) // 256 * 256
    assert asked == [last - 256] * 4
    assert len(after.loss) == len(before.loss) + 1
    fresh = Reader().curves(run.path)
    for name in ("loss", "entropy", "sec_mean", "sec_max", "logit", "ratio"):
        pd.testing.assert_frame_equal(getattr(after, name), getattr(fresh, name))


@pytest.mark.usefixtures("narrow")
def test_the_first_step_without_a_usable_loss_is_named_exactly(tmp_path: Path) -> None:
    run = write_big_run(tmp_path / "nan", steps=STEPS, every=EVERY, layers=1, heads=1)
    rows = [
        {"step": step, "loss": np.nan if step >= STEPS + 37 else 1.0, "measured": False}
        for step in range(STEPS, STEPS + 600)
    ]
    write_table(run.path, "steps", rows, number=5000)
    spans = Reader().curves(run.path).loss_not_finite
    assert (spans[0].first_step, spans[0].shown) == (STEPS + 37, "NaN")


@pytest.mark.usefixtures("narrow")
def test_scalars_and_overhead_of_a_long_run_are_those_of_its_steps(big: BigRun) -> None:
    reader = Reader()
    assert sorted(reader.scalars(big.path)) == ["accuracy", "grad_norm", "loss", "lr"]
    steps = open_run(big.path).steps()
    overhead = reader.overhead(big.path)
    assert overhead is not None
    spent_s, wall_s = overhead
    assert wall_s == pytest.approx(steps["time_s"].iloc[-1] - steps["time_s"].iloc[0])
    assert spent_s == pytest.approx(steps["overhead_s"].sum(), rel=1e-6)


def test_the_map_of_all_heads_shows_a_dip_of_one_step(big: BigRun) -> None:
    reader = Reader()
    layer, head, step, entropy = big.entropy_dip
    pairs = all_heads(reader.info(big.path)["sites"], pd.DataFrame({"layer": [], "head": []}))
    for most in (100, 10_000):
        frame, resolution = reader.series(big.path, "attention", ("entropy",), most=most)
        assert (resolution > 1) == (most == 100)
        heat = heads_over_steps_figure(frame, pairs, ENTROPY).data[0]
        assert heat.z.shape[0] == 4
        assert heat.z.shape[1] <= MOST_COLUMNS
        row, column = np.unravel_index(np.nanargmin(heat.z), heat.z.shape)
        assert heat.z[row, column] == entropy
        assert heat.x[column] <= step
        assert heat.x[column + 1] > step
        assert heat.y[row] == f"{layer.split('.')[1]} · {head}"


def test_a_zoomed_map_has_columns_of_single_steps(big: BigRun) -> None:
    reader = Reader()
    layer, head, step, entropy = big.entropy_dip
    pairs = [(layer, head)]
    frame, resolution = reader.series(big.path, "attention", ("entropy",), most=100)
    span = whole_buckets((step - 20, step + 20), resolution)
    part = reader.series(big.path, "attention", ("entropy",), span=span, most=500)[0]
    heat = heads_over_steps_figure(frame, pairs, ENTROPY, detail=(part, span)).data[0]
    assert heat.z[0, heat.x.tolist().index(step)] == entropy
    assert np.all(np.diff(heat.x) > 0)


def test_how_much_is_read_depends_on_the_number_of_heads() -> None:
    def info(layers: int, heads: int) -> dict[str, object]:
        return {"sites": [{"name": str(layer), "heads": heads} for layer in range(layers)]}

    # 600,000 rows: 4,166 steps of 144 heads; no more than 16,000 steps, no fewer than 1,000.
    assert most_steps("attention", info(12, 12)) == 4166
    assert most_steps("attention", info(12, 12), layer="3") == 16_000
    assert most_steps("attention", info(1, 1)) == 16_000
    assert most_steps("spectra", info(100, 100)) == 1000
    assert most_steps("steps", info(100, 100)) == 16_000
    assert most_steps("attention", {}) == 16_000


def test_neighbours_become_one_without_losing_a_spike() -> None:
    count = 10_007
    values = np.linspace(0.0, 1.0, count)
    curve = pd.DataFrame(
        {"step": np.arange(count) * 16, "value": values, "low": values - 1, "high": values + 1}
    )
    curve.loc[1234, "high"], curve.loc[4321, "low"] = 50.0, -50.0
    short = shortened(curve, 500)
    assert len(short) == 500
    assert (short["high"].max(), short["low"].min()) == (50.0, -50.0)
    assert short["step"].iloc[0] == 0
    assert shortened(short, 500) is short


def test_a_range_replaces_the_buckets_it_covers_and_no_others() -> None:
    whole = pd.DataFrame(
        {"step": [0, 16, 32], "value": [1.0, 2.0, 3.0], "low": [0.0, 1.0, 2.0], "high": [2.0, 3.0, 4.0]}
    )
    part = pd.DataFrame({"step": range(16, 32), "value": np.arange(16.0)})
    joined = spliced(whole, part, whole_buckets((20, 25), 16))
    assert joined["step"].tolist() == [0, *range(16, 32), 32]
    assert joined["low"].tolist() == [0.0, *np.arange(16.0), 2.0]
    assert spliced(whole, part.iloc[:0], (16, 31)) is whole


def test_what_takes_long_is_judged_by_a_process_of_its_own(tmp_path: Path) -> None:
    run = write_run(tmp_path, collapse=True)
    assert judged_at_once(read_manifest(run))
    # A million steps of 144 heads at every tenth: a minute of judging, which a person must ask for.
    sites = [{"name": str(layer), "heads": 12} for layer in range(12)]
    huge = {"steps": 1_000_000, "every": 10, "sites": sites}
    assert not judged_at_once(huge)
    assert not judged_unasked(huge)
    assert judged_unasked({**huge, "steps": 100_000})
    assert judge_apart(str(run)) == assess(run)
    assert "is not a directory" in str(judge_apart(str(tmp_path / "nothing")))


def test_resumes_are_told_with_the_step_and_what_became_of_the_attempt_before() -> None:
    attempts = [
        {"attempt": 1, "first_step": 0, "state": "crashed"},
        {"attempt": 2, "first_step": 1500, "state": "crashed"},
        {"attempt": 3, "first_step": None, "state": "running"},
    ]
    (mark,) = resumes(manifest("run", attempt=3, attempts=attempts))
    assert (mark.step, mark.kind) == (1500, "attempt")
    assert mark.text == "attempt 2 resumed at step 1,500 (attempt 1: crashed)"
    assert resumes({}) == ()
