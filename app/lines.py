"""One curve as one Plotly line: gaps stay gaps, few points get markers, many are decimated."""

from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from .decimate import MOST_POINTS, decimate, with_gaps
from .summary import Curve

POINTS_OF_ALL_LINES = 20_000
_FEW_POINTS = 60


def curve_trace(
    curve: Curve,
    name: str,
    style: Mapping[str, Any],
    hover: str,
    *,
    limit: int = MOST_POINTS,
    yaxis: str = "y",
) -> go.Scatter:
    """A line of at most `limit` points, without points where nothing was observed at all.

    Args:
        curve: columns step, value (NaN: not observed) and, for the hover text, where.
        name: for the legend.
        style: Plotly's `line`.
        hover: Plotly's `hovertemplate`; `where` follows it.
        limit: most points.
        yaxis: the axis it belongs to.
    """
    drawn = decimate(with_gaps(curve), limit)
    if drawn["value"].isna().all():
        # An axis without any point would invent a range of its own.
        drawn = drawn.iloc[:0]
    where = "where" in drawn and len(drawn) > 0
    return go.Scatter(
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


def limit_per_line(lines: int) -> int:
    """Points for each of several lines in one figure, so that the browser stays quick."""
    return max(200, POINTS_OF_ALL_LINES // max(1, lines))
