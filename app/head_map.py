"""Every head over the whole run in one map: heads down, steps across. Where to look first in a run of many heads."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import plotly.graph_objects as go

from .head_charts import HeadMetric, Pair, layer_order, short_names
from .series import HIGH, LOW, Span, finite, is_coarse
from .style import NOT_OBSERVED, axis, new_figure

MOST_COLUMNS = 500
_ROW_PX = 6
_LEAST_PX, _MOST_PX = 180, 900

Matrix = npt.NDArray[np.float64]


def alarming(frame: pd.DataFrame, metric: HeadMetric) -> pd.Series:
    """The metric at its alarming end: of coarse rows the lowest or highest of their steps, so that a spike is seen."""
    if not is_coarse(frame, metric.column):
        return finite(frame[metric.column])
    return finite(frame[metric.column + (LOW if metric.alarming_is_low else HIGH)])


def heads_over_steps_figure(
    frame: pd.DataFrame,
    pairs: Sequence[Pair],
    metric: HeadMetric,
    *,
    detail: tuple[pd.DataFrame, Span] | None = None,
    uirevision: str = "head-map",
) -> go.Figure:
    """Heads down, in the order of the model, steps across, colour the metric at its alarming end in each column.

    Args:
        frame: columns step, layer, head and the metric's; coarse ones may be (see series.py).
        pairs: every (layer, head) of the run.
        metric: what is shown.
        detail: more rows of a range of steps, and the range.
        uirevision: zoom survives new data as long as this stays the same.
    """
    layers = layer_order([layer for layer, _ in pairs])
    rank = {layer: number for number, layer in enumerate(layers)}
    ordered = sorted(pairs, key=lambda pair: (rank[pair[0]], pair[1]))
    steps, values_hs = _columns(frame, ordered, metric)
    if detail is not None:
        rows, (first, last) = detail
        inner, inner_hs = _columns(rows[(rows["step"] >= first) & (rows["step"] <= last)], ordered, metric)
        before, after = steps < first, steps > last
        steps = np.concatenate([steps[before], inner, steps[after]])
        values_hs = np.concatenate([values_hs[:, before], inner_hs, values_hs[:, after]], axis=1)
    short, pattern = short_names(layers)
    names = [f"{short[layer]} · {head}" for layer, head in ordered]
    height = 130 + min(_MOST_PX, max(_LEAST_PX, _ROW_PX * len(ordered)))
    end = "lowest" if metric.alarming_is_low else "highest"
    figure = new_figure(f"{metric.label} of every head, {end} per column", height, uirevision)
    figure.add_trace(
        go.Heatmap(
            z=values_hs.astype(np.float32),
            x=steps,
            y=names,
            colorscale="YlOrRd_r" if metric.alarming_is_low else "YlOrRd",
            colorbar={"thickness": 12, "tickformat": ".3~g", "title": {"text": metric.unit}},
            hoverongaps=False,
            hovertemplate=f"head %{{y}}<br>from step %{{x:,d}}<br>{metric.title} %{{z:.5g}} {metric.unit}<extra></extra>",
        )
    )
    figure.layout.xaxis = axis("step")
    title = f"layer ({pattern}) · head" if pattern else "layer · head"
    figure.layout.yaxis = axis(title, type="category", autorange="reversed", nticks=24)
    figure.update_layout(plot_bgcolor=NOT_OBSERVED, xaxis={"showgrid": False}, yaxis={"showgrid": False})
    return figure


def _columns(
    frame: pd.DataFrame, pairs: Sequence[Pair], metric: HeadMetric
) -> tuple[npt.NDArray[np.int64], Matrix]:
    """First step of each column, and a matrix of one row per head; neighbours are joined where there are too many."""
    steps, column_n = np.unique(frame["step"].to_numpy(dtype=np.int64), return_inverse=True)
    values_hs = np.full((len(pairs), len(steps)), np.nan)
    layer_n, names = pd.factorize(frame["layer"])
    row_of: dict[tuple[Any, int], int] = {pair: row for row, pair in enumerate(pairs)}
    head_n = frame["head"].to_numpy(dtype=np.int64)
    row_lh = np.array(
        [[row_of.get((str(name), head), -1) for head in range(head_n.max(initial=0) + 1)] for name in names],
        dtype=np.int64,
    ).reshape(len(names), -1)
    row_n = row_lh[layer_n, head_n] if len(frame) else np.zeros(0, np.int64)
    known = row_n >= 0
    values_hs[row_n[known], column_n[known]] = alarming(frame, metric).to_numpy()[known]
    if len(steps) > MOST_COLUMNS:
        edges = np.arange(MOST_COLUMNS) * len(steps) // MOST_COLUMNS
        outermost = np.fmin if metric.alarming_is_low else np.fmax
        return steps[edges], outermost.reduceat(values_hs, edges, axis=1)
    return steps, values_hs
