"""One curve as Plotly lines: gaps stay gaps, few points get markers, of coarse rows a band shows the extremes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from .decimate import MOST_POINTS, decimate, with_gaps
from .series import shortened
from .style import faded
from .summary import Curve

POINTS_OF_ALL_LINES = 20_000
_FEW_POINTS = 60
_FLOAT32_STEPS = 2**24
_BAND_OPACITY = 0.18
# A spike of one bucket is no wider than its edge.
_EDGE_OPACITY = 0.45


def curve_traces(
    curve: Curve,
    name: str,
    style: Mapping[str, Any],
    hover: str,
    *,
    limit: int = MOST_POINTS,
    yaxis: str = "y",
    log: bool = False,
    crowded: bool = False,
) -> list[go.Scatter]:
    """A line of at most `limit` points, without points where nothing was observed at all; its band before it.

    Args:
        curve: columns step, value (NaN: not observed), of coarse rows low and high, and, for the hover text, where.
        name: for the legend.
        style: Plotly's `line`.
        hover: Plotly's `hovertemplate`; `where` follows it.
        limit: most points.
        yaxis: the axis it belongs to.
        log: whether that axis is logarithmic.
        crowded: whether other lines share the plot, whose bands must not hide each other.
    """
    banded = "low" in curve
    drawn = with_gaps(shortened(curve, limit)) if banded else decimate(with_gaps(curve), limit)
    if drawn["value"].isna().all():
        # An axis without any point would invent a range of its own.
        drawn = drawn.iloc[:0]
    where = "where" in drawn and len(drawn) > 0
    line = go.Scatter(
        x=drawn["step"].to_numpy(),
        y=drawn["value"].to_numpy(dtype="float64"),
        name=name,
        mode="lines+markers" if len(drawn) <= _FEW_POINTS else "lines",
        marker={"size": 4},
        line=dict(style),
        connectgaps=False,
        xaxis="x",
        yaxis=yaxis,
        text=drawn["where"].fillna("").to_list() if where else None,
        hovertemplate=hover + (" %{text}" if where else ""),
    )
    if not banded or drawn.empty:
        return [line]
    line.customdata = drawn[["low", "high"]].to_numpy(dtype="float32")
    line.hovertemplate = (
        hover + " (%{customdata[0]:.4g} to %{customdata[1]:.4g})" + (" %{text}" if where else "")
    )
    return [_band(drawn, name, style, yaxis, log=log, crowded=crowded), line]


def add_lines(figure: go.Figure, curves: Sequence[Sequence[go.Scatter]]) -> None:
    """Adds what `curve_traces` gave for each of several curves, all bands below all lines."""
    figure.add_traces([trace for traces in curves for trace in traces[:-1]])
    figure.add_traces([traces[-1] for traces in curves])


def _band(
    drawn: Curve, name: str, style: Mapping[str, Any], yaxis: str, *, log: bool, crowded: bool
) -> go.Scatter:
    """From low to high, as one outline per stretch without a gap; as wide as a line where it is a spike."""
    # Half the bytes to send, as long as every step is a float32.
    steps_are_short = drawn["step"].iloc[-1] < _FLOAT32_STEPS
    step_n = drawn["step"].to_numpy(dtype=np.float32 if steps_are_short else np.float64)
    low_n, high_n = (drawn[side].to_numpy(dtype=np.float32) for side in ("low", "high"))
    if log:
        # Zero has no place on a log axis: the band ends where its top is.
        low_n = np.where(low_n > 0, low_n, np.where(high_n > 0, high_n, np.nan))
        high_n = np.where(high_n > 0, high_n, np.nan)
    known_n = np.isfinite(low_n) & np.isfinite(high_n)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], known_n, [False]]).astype(np.int8)))
    x, y, gap = [], [], np.array([np.nan], dtype=np.float32)
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        part = slice(first, end)
        x += [step_n[part], step_n[part][::-1], gap]
        y += [high_n[part], low_n[part][::-1], gap]
    return go.Scatter(
        x=np.concatenate([step_n[:0], *x]),
        y=np.concatenate([low_n[:0], *y]),
        name=f"{name}, lowest to highest",
        mode="lines",
        line={"color": faded(style["color"], _EDGE_OPACITY / (1.5 if crowded else 1)), "width": 1},
        fill="toself",
        fillcolor=faded(style["color"], _BAND_OPACITY / (4 if crowded else 1)),
        connectgaps=False,
        xaxis="x",
        yaxis=yaxis,
        showlegend=False,
        hoverinfo="skip",
    )


def limit_per_line(lines: int) -> int:
    """Points for each of several lines in one figure, so that the browser stays quick."""
    return max(200, POINTS_OF_ALL_LINES // max(1, lines))
