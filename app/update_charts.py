"""Figures of the optimizer's updates by parameter, and of whatever scalars the training loop handed in."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from .lines import add_lines, curve_traces, limit_per_line
from .overlays import add_tau_lines
from .series import HIGH, LOW, curve_of, is_coarse
from .style import BLACK, axis, legend_below, line_style, log_axis, new_figure
from .summary import TauSpan

_MOST_FIRED = 2000
_MANY_DECADES = 4.0
_NAME_PX = 230


def largest_updates(updates: pd.DataFrame, count: int) -> list[str]:
    """The parameters with the largest ratio at any step, the largest first.

    Args:
        updates: columns parameter, ratio; coarse ones may be (see series.py).
        count: how many.
    """
    column = "ratio" + HIGH if is_coarse(updates, "ratio") else "ratio"
    finite = updates[np.isfinite(updates[column].astype("float64"))]
    top = finite.groupby("parameter")[column].max().sort_values(ascending=False, kind="stable")
    return [str(name) for name in top.index[:count]]


def update_figure(
    updates: pd.DataFrame, parameters: Sequence[str], taus: Sequence[TauSpan], *, uirevision: str = "updates"
) -> go.Figure:
    """sigma1(dW) / sigma1(W) by parameter with the tau line, and marks where the bound held an update back.

    Args:
        updates: columns step, parameter, ratio, scale; coarse ones may be (see series.py).
        parameters: which to draw, in the order of the legend.
        taus: when the bound was armed; without any a dashed reference is drawn.
        uirevision: zoom survives new data as long as this stays the same.
    """
    figure = new_figure("size of each update against its weight", 480, uirevision, hovermode="closest")
    limit = limit_per_line(len(parameters))
    curves = []
    for number, parameter in enumerate(parameters):
        curve = curve_of(updates[updates["parameter"] == parameter], "ratio")
        # A zero or infinite ratio has no place on a log axis; the gap says so better than a clipped point.
        curve["value"] = curve["value"].where(curve["value"] > 0)
        hover = f"{parameter}<br>step %{{x:,d}}<br>ratio %{{y:.4g}}"
        traces = curve_traces(
            curve, parameter, line_style(number), hover, limit=limit, log=True, crowded=len(parameters) > 1
        )
        traces[-1].hovertemplate += "<extra></extra>"
        curves.append(traces)
    add_lines(figure, curves)
    least = "scale" + LOW if is_coarse(updates, "scale") else "scale"
    fired = updates[updates["parameter"].isin(list(parameters)) & (updates[least] < 1)]
    if len(fired):
        figure.add_trace(_fired_trace(fired, least))
    steps = updates["step"]
    ends = (int(steps.min()), int(steps.max())) if len(steps) else (0, 1)
    add_tau_lines(figure, taus, "y", ends, fired=bool((updates[least] < 1).any()))
    figure.layout.xaxis = axis("step", hoverformat=",d", rangemode="nonnegative")
    # 1, 2, 5 within a decade; over many decades these would stand on each other.
    figure.layout.yaxis = log_axis("σ₁(ΔW) / σ₁(W)", dtick=1 if _decades(figure) > _MANY_DECADES else "D2")
    legend_below(figure, sum(trace.showlegend is not False for trace in figure.data), _NAME_PX)
    return figure


def scalar_figure(curve: pd.DataFrame, name: str, *, uirevision: str = "scalar") -> go.Figure:
    """One scalar of the training loop over its steps.

    Args:
        curve: columns step and value, and low and high where a point stands for many steps.
        name: of the scalar, as it was handed in.
        uirevision: zoom survives new data as long as this stays the same.
    """
    figure = new_figure(name, 360, uirevision, hovermode="x unified")
    figure.add_traces(curve_traces(curve, name, line_style(0), "%{y:.5g}"))
    figure.layout.xaxis = axis("step", hoverformat=",d", rangemode="nonnegative")
    figure.layout.yaxis = axis(name)
    known = curve["value"].dropna()
    if len(known) and known.min() == known.max() != 0:
        # Left alone, Plotly shows a constant between itself -1 and +1, where a learning rate looks like zero.
        figure.layout.yaxis.range = sorted((0.0, 2.0 * float(known.iloc[0])))
    return figure


def _decades(figure: go.Figure) -> float:
    known = np.concatenate([np.asarray(trace.y, dtype=np.float64) for trace in figure.data])
    known = known[known > 0]
    return float(np.log10(known.max() / known.min())) if known.size else 0.0


def _fired_trace(fired: pd.DataFrame, least: str) -> go.Scatter:
    shown = fired.iloc[
        np.unique(np.linspace(0, len(fired) - 1, min(_MOST_FIRED, len(fired))).round().astype(int))
    ]
    return go.Scatter(
        x=shown["step"].to_numpy(),
        y=shown["ratio"].to_numpy(dtype=np.float64),
        mode="markers",
        name="bound fired (scale < 1)"
        if len(shown) == len(fired)
        else f"bound fired ({len(fired):,} times, thinned)",
        marker={"symbol": "triangle-down-open", "size": 8, "color": BLACK},
        customdata=np.column_stack([shown["parameter"].astype(object), shown[least].astype(object)]),
        hovertemplate="%{customdata[0]}<br>step %{x:,d}<br>update scaled by %{customdata[1]:.3g}<extra></extra>",
    )
