"""The figures hold the numbers of the tables they were given, and nothing that was not measured."""

import html
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from diagnostics.app.decimate import MOST_POINTS
from diagnostics.app.head_charts import (
    HEAD_METRICS,
    all_heads,
    head_lines_figure,
    heat_figure,
    layer_order,
    metric_range,
    short_names,
    spectrum_lines_figure,
    spectrum_map_figure,
    thinned_spectrum,
)
from diagnostics.app.step_charts import compare_figure, overview_figure
from diagnostics.app.style import PALETTE, line_style
from diagnostics.app.summary import Mark, NotFinite, RunCurves, TauSpan
from diagnostics.app.update_charts import largest_updates, update_figure
from diagnostics.store.format import SCHEMAS

ENTROPY = next(metric for metric in HEAD_METRICS if metric.column == "entropy")


def curve(values: list[float], every: int = 10) -> pd.DataFrame:
    return pd.DataFrame({"step": np.arange(len(values)) * every, "value": values})


def run(**changes: Any) -> RunCurves:
    whole = {
        "loss": curve([3.0, 2.0, 1.0], 1),
        "entropy": curve([3.5, 3.0]),
        "sec_mean": curve([0.2, 0.3]),
        "sec_max": curve([0.4, 0.6]),
        "logit": curve([1.0, 50.0]),
        "ratio": curve([0.01, 0.02]),
    }
    return RunCurves(**{**whole, **changes})


def trace(figure: Any, name: str) -> Any:
    found = [one for one in figure.data if one.name == name]
    assert len(found) == 1, [one.name for one in figure.data]
    return found[0]


def texts(figure: Any) -> list[str]:
    return [annotation.text for annotation in figure.layout.annotations]


def test_the_overview_holds_every_curve_on_one_step_axis() -> None:
    figure = overview_figure(run())
    shown = {
        name: trace(figure, name)
        for name in ("loss", "lowest entropy", "largest logit", "largest update ratio")
    }
    assert shown["loss"].y.tolist() == [3.0, 2.0, 1.0]
    assert shown["lowest entropy"].y.tolist() == [3.5, 3.0]
    assert shown["lowest entropy"].x.tolist() == [0, 10]
    assert shown["largest logit"].y.tolist() == [1.0, 50.0]
    assert shown["largest update ratio"].y.tolist() == [0.01, 0.02]
    assert trace(figure, "SEC₁, mean of heads").y.tolist() == [0.2, 0.3]
    assert trace(figure, "SEC₁, highest head").y.tolist() == [0.4, 0.6]
    assert {one.xaxis for one in figure.data} == {"x"}
    assert len({one.yaxis for one in shown.values()}) == 4


def test_the_axes_say_step_and_units() -> None:
    figure = overview_figure(run())
    assert figure.layout.xaxis.title.text == "step"
    assert any("(nats)" in text for text in texts(figure))


def test_a_row_without_data_says_so() -> None:
    figure = overview_figure(run(entropy=curve([math.nan, math.nan]), logit=curve([])))
    assert texts(figure).count("not observed") == 2
    assert not len(trace(figure, "lowest entropy").x)


def test_gaps_stay_gaps() -> None:
    figure = overview_figure(run(entropy=curve([3.0, math.nan, 2.0])))
    entropy = trace(figure, "lowest entropy")
    assert math.isnan(entropy.y[1])
    assert entropy.connectgaps is False


def test_alerts_and_commands_cross_all_rows_and_carry_their_text() -> None:
    marks = [
        Mark(4, "alert", "critical", "entropy falls"),
        Mark(4, "alert", "critical", "logits grow"),
        Mark(8, "control", "info", "bound armed"),
    ]
    figure = overview_figure(run(), marks)
    alert = trace(figure, "alert (critical)")
    assert alert.x[:2].tolist() == [4.0, 4.0]
    assert alert.text[0] == "entropy falls<br>logits grow"
    assert trace(figure, "control command").x[0] == 8.0
    spanning = figure.layout[f"yaxis{alert.yaxis[1:]}"]
    assert tuple(spanning.domain) == (0, 1)
    assert tuple(spanning.range) == (0, 1)


def test_a_long_alert_is_wrapped_and_its_signs_are_no_tags() -> None:
    message = "sigma1 < tau " * 20
    text = trace(overview_figure(run(), [Mark(4, "alert", "warning", message)]), "alert (warning)").text[0]
    lines = text.split("<br>")
    assert max(len(html.unescape(line)) for line in lines) <= 80
    assert html.unescape(" ".join(lines)) == message.strip()
    assert "< tau" not in text


def test_a_nan_loss_is_said_in_words() -> None:
    figure = overview_figure(run(loss_not_finite=(NotFinite(7, 9, "NaN"),)))
    assert "loss is NaN from step 7" in texts(figure)
    assert "7 to 9" in trace(figure, "loss is not finite").text[0]


def test_without_a_bound_the_tau_line_is_a_dashed_reference() -> None:
    reference = trace(overview_figure(run()), "tau 0.01 (not armed)")
    assert reference.line.dash == "dash"
    assert list(reference.y) == [0.01, 0.01]


def test_a_bound_that_fired_unrecorded_is_not_called_absent() -> None:
    names = [str(one.name) for one in overview_figure(run(bound_fired=True)).data]
    assert "tau 0.01 (reference, the tau of the bound is not recorded)" in names
    assert not any("not armed" in name for name in names)


def test_an_armed_bound_is_drawn_from_its_step_on() -> None:
    figure = overview_figure(run(), taus=[TauSpan(1, None, 0.05)])
    armed = trace(figure, "tau 0.05 from step 1")
    assert (list(armed.x), list(armed.y)) == ([1, 10], [0.05, 0.05])
    assert not any("not armed" in str(one.name) for one in figure.data)


def test_a_long_run_is_drawn_with_few_points_and_its_spike() -> None:
    values = np.full(200_000, 2.0)
    values[123_456] = 9.0
    figure = overview_figure(run(loss=pd.DataFrame({"step": np.arange(200_000), "value": values})))
    loss = trace(figure, "loss")
    assert len(loss.x) <= MOST_POINTS
    assert loss.x[int(np.argmax(loss.y))] == 123_456


def test_an_empty_run_is_a_figure_without_curves() -> None:
    figure = overview_figure(RunCurves())
    assert texts(figure).count("not observed") == 5


def test_runs_are_laid_over_each_other_in_colours_of_their_own() -> None:
    figure = compare_figure({"a": run(), "b": run(loss=curve([9.0, 8.0], 1), entropy=curve([]))})
    assert {one.name for one in figure.data} == {"a", "b"}
    colours = {name: {one.line.color for one in figure.data if one.name == name} for name in ("a", "b")}
    assert len(colours["a"]) == len(colours["b"]) == 1
    assert colours["a"] != colours["b"]
    assert [one.name for one in figure.data if one.showlegend] == ["a", "b"]
    losses = [one.y.tolist() for one in figure.data if one.yaxis == "y"]
    assert losses == [[3.0, 2.0, 1.0], [9.0, 8.0]]


def test_more_lines_than_colours_stay_distinguishable() -> None:
    styles = [(line_style(n)["color"], line_style(n)["dash"]) for n in range(3 * len(PALETTE))]
    assert len(set(styles)) == len(styles)


def test_the_heat_map_holds_the_step_and_crosses_out_what_is_null() -> None:
    frame = pd.DataFrame(
        {"layer": ["b.0.attn", "b.0.attn", "b.1.attn"], "head": [0, 1, 0], "entropy": [3.0, math.nan, 1.5]}
    )
    pairs = [("b.0.attn", 0), ("b.0.attn", 1), ("b.1.attn", 0), ("b.1.attn", 1)]
    figure = heat_figure(frame, pairs, ENTROPY, step=20, scale=(0.0, 4.0))
    heat, crosses = figure.data
    assert heat.z[0][0] == 3.0
    assert heat.z[1][0] == 1.5
    assert np.isnan(heat.z[0][1])
    assert np.isnan(heat.z[1][1])
    assert (heat.zmin, heat.zmax) == (0.0, 4.0)
    assert list(zip(crosses.y, crosses.x, strict=True)) == [("0", "1"), ("1", "1")]
    assert "not observed" in crosses.hovertemplate
    assert "nats" in heat.hovertemplate
    assert "step 20" in figure.layout.title.text


def test_the_colour_scale_is_that_of_the_run() -> None:
    assert metric_range(pd.Series([0.5, math.nan, 3.5, math.inf])) == (0.5, 3.5)
    assert metric_range(pd.Series([math.nan])) == (0.0, 1.0)
    low, high = metric_range(pd.Series([2.0, 2.0]))
    assert low < 2.0 < high


def test_every_mapped_metric_is_a_column_of_its_table() -> None:
    for metric in HEAD_METRICS:
        assert metric.column in SCHEMAS[metric.table].names


def test_block_two_comes_before_block_ten() -> None:
    assert layer_order(["h.10.attn", "h.2.attn", "h.2.attn"]) == ["h.2.attn", "h.10.attn"]


@pytest.mark.parametrize(
    ("layers", "names", "pattern"),
    [
        (["m.0.attn", "m.1.attn"], ["0", "1"], "m.*.attn"),
        (["enc.0.attn", "dec.0.attn"], ["enc", "dec"], "*.0.attn"),
        (["attn"], ["attn"], ""),
        (["a", "a.b"], ["a", "a.b"], ""),
    ],
)
def test_layers_are_called_by_what_tells_them_apart(
    layers: list[str], names: list[str], pattern: str
) -> None:
    short, shared = short_names(layers)
    assert [short[layer] for layer in layers] == names
    assert shared == pattern


def test_heads_of_the_manifest_are_shown_even_where_the_table_has_none() -> None:
    frame = pd.DataFrame({"layer": ["a"], "head": [0]})
    assert all_heads([{"name": "a", "heads": 2}], frame) == [("a", 0), ("a", 1)]


def test_each_head_of_a_layer_has_its_line() -> None:
    frame = pd.DataFrame({"step": [0, 0, 10, 10], "head": [0, 1, 0, 1], "entropy": [3.0, 2.0, 1.0, math.nan]})
    figure = head_lines_figure(frame, "a", ENTROPY)
    assert trace(figure, "head 0").y.tolist() == [3.0, 1.0]
    assert math.isnan(trace(figure, "head 1").y[1])


def test_the_spectrum_map_is_log10_of_the_singular_values() -> None:
    spectrum = pd.DataFrame([[10.0, 1.0], [100.0, 0.0]], index=[0, 10], columns=[1, 2])
    heat = spectrum_map_figure(spectrum, "a head 0", share=False).data[0]
    assert heat.z[0].tolist() == [1.0, 2.0]
    assert heat.z[1][0] == 0.0
    assert heat.customdata[1].tolist() == [1.0, 0.0]
    assert np.isfinite(heat.z[1][1])


def test_shares_of_energy_add_up_to_one() -> None:
    spectrum = pd.DataFrame([[3.0, 1.0], [math.nan, math.nan], [2.0, 2.0]], index=[0, 10, 20], columns=[1, 2])
    lines = spectrum_lines_figure(spectrum, "a head 0", share=True).data
    assert [line.name for line in lines] == ["step 0", "step 20"]
    assert lines[0].y.tolist() == pytest.approx([0.9, 0.1])
    assert lines[1].y.tolist() == pytest.approx([0.5, 0.5])


def test_a_thinned_spectrum_keeps_the_step_that_jumps() -> None:
    sigma = np.ones(5000)
    sigma[1234] = 7.0
    thin = thinned_spectrum(pd.DataFrame({1: sigma}, index=np.arange(5000)), 100)
    assert len(thin) == 100
    assert 1234 in thin.index


def test_updates_show_the_largest_and_where_the_bound_fired() -> None:
    updates = pd.DataFrame(
        {
            "step": [0, 0, 0, 10, 10, 10],
            "parameter": ["a", "b", "c"] * 2,
            "ratio": [0.1, 0.5, math.inf, 0.2, 0.01, 0.0],
            "scale": [1.0, 1.0, 1.0, 1.0, 0.25, 1.0],
        }
    )
    assert largest_updates(updates, 2) == ["b", "a"]
    figure = update_figure(updates, ["a", "b"], [TauSpan(0, None, 0.01)])
    assert trace(figure, "a").y.tolist() == [0.1, 0.2]
    fired = trace(figure, "bound fired (scale < 1)")
    assert (fired.x.tolist(), fired.y.tolist()) == ([10], [0.01])
    assert fired.customdata[0].tolist() == ["b", 0.25]
    assert figure.layout.yaxis.type == "log"
    # Neither an infinite nor a zero ratio has a place on a log axis: no line at all, rather than a wrong one.
    assert not len(trace(update_figure(updates, ["c"], []), "c").x)
