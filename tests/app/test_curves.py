"""Per-step summaries, gaps and decimation against values worked out by hand or by brute force."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from diagnostics.app.decimate import decimate, with_gaps
from diagnostics.app.summary import RunCurves, marks_of, run_curves, smoothed, tau_spans
from diagnostics.store.format import SCHEMAS


def curve(steps: list[int], values: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"step": steps, "value": values})


def events(*rows: dict[str, object]) -> pd.DataFrame:
    return pd.DataFrame(list(rows), columns=SCHEMAS["events"].names)


def curves_of(**tables: list[dict[str, object]]) -> RunCurves:
    columns = {
        "steps": ["step", "loss", "loss_not_finite"],
        "attention": ["step", "layer", "head", "entropy", "max_logit"],
        "spectra": ["step", "layer", "head", "sec_1"],
        "updates": ["step", "parameter", "ratio", "scale"],
    }
    return run_curves(*(pd.DataFrame(tables.get(name, []), columns=columns[name]) for name in columns))


def test_a_short_curve_is_not_decimated() -> None:
    short = curve([0, 1, 2], [1.0, math.nan, 3.0])
    assert decimate(short, 5) is short


@pytest.mark.parametrize("count", [101, 5000, 99_991])
def test_decimation_keeps_ends_and_extremes_within_the_limit(count: int) -> None:
    rng = np.random.default_rng(count)
    values = rng.standard_normal(count)
    spike, dip = count // 3, count // 2
    values[spike], values[dip] = 1e6, -1e6
    kept = decimate(curve(list(range(count)), list(values)), 100)
    assert len(kept) <= 100
    assert {0, spike, dip, count - 1} <= set(kept["step"])
    assert kept["step"].is_monotonic_increasing
    # Every point shown is a point of the run.
    assert (kept["value"].to_numpy() == values[kept["step"]]).all()


def test_decimation_keeps_the_lowest_and_highest_of_every_bucket() -> None:
    values = np.random.default_rng(0).standard_normal(1000)
    kept = set(decimate(curve(list(range(1000)), list(values)), 32)["step"])
    buckets = [[step for step in range(1000) if step * 10 // 1000 == bucket] for bucket in range(10)]
    for bucket in buckets:
        assert min(bucket, key=lambda step: values[step]) in kept
        assert max(bucket, key=lambda step: values[step]) in kept


def test_decimation_keeps_a_gap() -> None:
    values = np.arange(3000.0)
    values[1500:1502] = np.nan
    assert decimate(curve(list(range(3000)), list(values)), 50)["value"].isna().sum() == 1


def test_decimation_of_nothing_but_gaps_shows_gaps() -> None:
    kept = decimate(curve(list(range(3000)), [math.nan] * 3000), 50)
    assert 0 < len(kept) <= 50
    assert kept["value"].isna().all()


def test_missing_steps_break_the_line() -> None:
    holed = with_gaps(curve([0, 10, 20, 60, 70, 80], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]))
    assert holed["step"].tolist() == [0, 10, 20, 40, 60, 70, 80]
    assert np.flatnonzero(holed["value"].isna()).tolist() == [3]


def test_another_stride_is_no_gap() -> None:
    changed = curve([0, 1, 2, 3, 10, 20, 30], [0.0] * 7)
    assert with_gaps(changed)["value"].notna().sum() == 7
    assert 15 not in with_gaps(changed)["step"].tolist()


def test_the_lowest_entropy_names_its_head() -> None:
    rows: list[dict[str, object]] = [
        {"step": 0, "layer": "a", "head": 0, "entropy": 3.0, "max_logit": 7.0},
        {"step": 0, "layer": "b", "head": 1, "entropy": 0.5, "max_logit": 2.0},
        {"step": 10, "layer": "a", "head": 0, "entropy": 0.25, "max_logit": math.inf},
        {"step": 10, "layer": "b", "head": 1, "entropy": math.nan, "max_logit": 9.0},
    ]
    curves = curves_of(attention=rows)
    assert curves.entropy["value"].tolist() == [0.5, 0.25]
    assert curves.entropy["where"].tolist() == ["b head 1", "a head 0"]
    assert curves.logit["value"].tolist() == [7.0, 9.0]
    assert curves.logit["where"].tolist() == ["a head 0", "b head 1"]


def test_a_step_at_which_every_head_is_null_is_a_gap() -> None:
    rows: list[dict[str, object]] = [
        {"step": step, "layer": "a", "head": 0, "entropy": entropy, "max_logit": math.nan}
        for step, entropy in ((0, 1.0), (10, math.nan), (20, 2.0))
    ]
    curves = curves_of(attention=rows)
    assert curves.entropy["step"].tolist() == [0, 10, 20]
    assert math.isnan(curves.entropy["value"].iloc[1])
    assert curves.logit["value"].isna().all()


def test_sec_is_summarised_by_mean_and_highest_head() -> None:
    rows: list[dict[str, object]] = [
        {"step": 0, "layer": "a", "head": head, "sec_1": value}
        for head, value in ((0, 0.2), (1, 0.6), (2, math.nan))
    ]
    curves = curves_of(spectra=rows)
    assert curves.sec_mean["value"].tolist() == pytest.approx([0.4])
    assert curves.sec_max["value"].tolist() == [0.6]


def test_a_nan_loss_is_told_apart_from_a_loss_that_was_not_handed_in() -> None:
    losses = [1.0, math.nan, math.nan, math.nan, math.inf, 2.0]
    handed_in = [False, False, True, True, False, False]
    rows: list[dict[str, object]] = [
        {"step": step, "loss": loss, "loss_not_finite": bad or loss == math.inf}
        for step, (loss, bad) in enumerate(zip(losses, handed_in, strict=True))
    ]
    spans = curves_of(steps=rows).loss_not_finite
    assert [(span.first_step, span.last_step) for span in spans] == [(2, 4)]
    assert spans[0].shown == "NaN"


def test_smoothing_sees_no_later_step_and_keeps_gaps() -> None:
    values = [1.0, 2.0, math.nan, 4.0, 8.0]
    smooth = smoothed(curve(list(range(5)), values), 3)["value"]
    cut = smoothed(curve(list(range(2)), values[:2]), 3)["value"]
    assert smooth.iloc[:2].tolist() == cut.tolist()
    assert math.isnan(smooth.iloc[2])
    # Weights 1/4, 1/2, 1 of span 3 (alpha = 1/2), over the values that are there.
    assert smooth.iloc[3] == pytest.approx((1 / 4 * 1 + 1 / 2 * 2 + 4) / (1 / 4 + 1 / 2 + 1))


def test_alerts_and_commands_are_marked_and_nothing_else() -> None:
    marks = marks_of(
        events(
            {
                "step": 5,
                "kind": "alert",
                "severity": "critical",
                "layer": "a",
                "head": 1,
                "message": "entropy falls",
            },
            {"step": 6, "kind": "control", "severity": "info", "message": "spectral bound armed"},
            {"step": 7, "kind": "suggestion", "severity": "info", "message": "arm it"},
        )
    )
    assert [(mark.step, mark.kind, mark.text) for mark in marks] == [
        (5, "alert", "entropy falls (a head 1)"),
        (6, "control", "spectral bound armed"),
    ]


def test_tau_is_read_from_applied_commands_only() -> None:
    def control(step: int, **data: object) -> dict[str, object]:
        return {"step": step, "kind": "control", "data": json.dumps(data)}

    armed = {"command": "spectral-bound", "arguments": {"tau": 0.02}, "status": "applied"}
    refused = {"command": "spectral-bound", "arguments": {"tau": 0.5}, "status": "rejected"}
    observing = {"command": "spectral-bound", "arguments": {"tau": "inf"}, "status": "applied"}
    disarmed = {"command": "disarm", "arguments": {"name": "spectral-bound"}, "status": "applied"}
    rows = events(
        control(10, **armed), control(20, **refused), control(30, **disarmed), control(40, **observing)
    )
    assert [(span.first_step, span.last_step, span.tau) for span in tau_spans(rows, {})] == [(10, 30, 0.02)]


def test_tau_of_a_bound_armed_from_the_start_is_read_from_the_manifest() -> None:
    spans = tau_spans(events(), {"remedies": [{"name": "spectral-bound", "tau": 0.01}]})
    assert [(span.first_step, span.last_step, span.tau) for span in spans] == [(0, None, 0.01)]


def test_an_unreadable_event_arms_nothing() -> None:
    rows = events(
        {"step": 1, "kind": "control", "data": "{half"}, {"step": 2, "kind": "control", "data": None}
    )
    assert tau_spans(rows, {}) == ()


@pytest.mark.parametrize("told", [{}, {"step": 40}])
def test_a_bound_that_a_command_armed_is_drawn_from_the_command_on_and_once(told: dict[str, int]) -> None:
    armed = {"data": json.dumps({"command": "spectral-bound", "status": "done", "after": {"tau": 0.01}})}
    rows = events({"step": 36, "kind": "control", **armed})
    spans = tau_spans(rows, {"remedies": [{"name": "spectral-bound", "tau": 0.01, **told}]})
    assert [(span.first_step, span.last_step, span.tau) for span in spans] == [(36, None, 0.01)]


def test_a_bound_armed_in_code_is_drawn_from_the_step_that_met_it_armed() -> None:
    spans = tau_spans(events(), {"remedies": [{"name": "spectral-bound", "tau": 0.01, "step": 20}]})
    assert [(span.first_step, span.last_step, span.tau) for span in spans] == [(20, None, 0.01)]
