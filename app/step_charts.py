"""Figures over the step axis: one run's overview, several runs laid over each other. Pure: curves in, figure out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from .lines import curve_traces, limit_per_line
from .overlays import add_marks, add_not_finite, add_tau_lines
from .style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    VERMILION,
    axis,
    line_style,
    log_axis,
    new_figure,
)
from .summary import Curve, Mark, RunCurves, TauSpan, smoothed

_ROW_PX = 165
_TOP_PX = 44
_BOTTOM_PX = 48
_SHORT_RUN = 60
_RAW_LOSS = "rgba(0, 114, 178, 0.30)"


@dataclass(frozen=True)
class _Row:
    """One stacked plot of a step figure: what it shows, and its title with the unit."""

    key: str
    title: str
    log: bool = False


ROWS = (
    _Row("loss", "loss"),
    _Row("entropy", "lowest attention entropy of any head (nats)"),
    _Row("sec_max", "spectral energy concentration SEC₁ (share, 0 to 1)"),
    _Row("logit", "largest attention logit of any head"),
    _Row("ratio", "largest update ratio σ₁(ΔW) / σ₁(W)", log=True),
)
_AXES = {row.key: f"y{number + 1 if number else ''}" for number, row in enumerate(ROWS)}
_LOG = {row.key: row.log for row in ROWS}
_MARK_AXIS = f"y{len(ROWS) + 1}"


def overview_figure(
    curves: RunCurves,
    marks: Sequence[Mark] = (),
    taus: Sequence[TauSpan] = (),
    *,
    uirevision: str = "overview",
) -> go.Figure:
    """Loss, entropy, SEC, logits and update ratio of one run, stacked on one step axis, with alerts and commands.

    Where a point stands for many steps, a band reaches from their lowest to their highest value.

    Args:
        curves: the run's per-step summary.
        marks: events drawn as lines through every row.
        taus: when the spectral bound was armed; without any a dashed reference stands at `overlays.DEFAULT_TAU`.
        uirevision: zoom survives new data as long as this stays the same.
    """
    figure = _stacked(uirevision)
    span = smoothing_span(curves.loss)
    raw = {"color": _RAW_LOSS if span > 1 else BLUE, "width": 1}
    lines = [
        (curves.loss, "loss", "loss", raw, "%{y:.4g}"),
        (curves.entropy, "lowest entropy", "entropy", _solid(GREEN), "%{y:.3g} nats"),
        (curves.sec_max, "SEC₁, highest head", "sec_max", _solid(VERMILION), "%{y:.3f}"),
        (curves.sec_mean, "SEC₁, mean of heads", "sec_max", _solid(ORANGE), "%{y:.3f}"),
        (curves.logit, "largest logit", "logit", _solid(PURPLE), "%{y:.4g}"),
        (curves.ratio, "largest update ratio", "ratio", _solid(BLACK), "%{y:.3g}"),
    ]
    if span > 1:
        smooth = smoothed(curves.loss, span)
        lines.insert(1, (smooth, f"loss, mean of ~{span} steps", "loss", _solid(BLUE), "%{y:.4g}"))
    for curve, name, row, style, hover in lines:
        traces = curve_traces(curve, name, style, hover, yaxis=_AXES[row], log=_LOG[row])
        # A row with one curve is named by its title.
        traces[-1].showlegend = row in ("loss", "sec_max")
        figure.add_traces(traces)
    add_tau_lines(figure, taus, _AXES["ratio"], _step_range(curves), fired=curves.bound_fired)
    add_not_finite(figure, curves.loss_not_finite, _AXES["loss"], _MARK_AXIS)
    add_marks(figure, marks, _MARK_AXIS)
    observed = {row: bool(curve["value"].notna().any()) for curve, _, row, _, _ in lines}
    _say_what_is_missing(figure, observed)
    return figure


def compare_figure(runs: Mapping[str, RunCurves], *, uirevision: str = "compare") -> go.Figure:
    """The same rows for several runs, one colour per run, on one step axis.

    Args:
        runs: name to per-step summary, in the order of the legend.
        uirevision: zoom survives new data as long as this stays the same.
    """
    figure = _stacked(uirevision)
    limit = limit_per_line(len(runs))
    observed = dict.fromkeys(_AXES, False)
    for number, (name, curves) in enumerate(runs.items()):
        span = smoothing_span(curves.loss)
        shown: dict[str, Curve] = {
            "loss": smoothed(curves.loss, span) if span > 1 else curves.loss,
            "entropy": curves.entropy,
            "sec_max": curves.sec_mean,
            "logit": curves.logit,
            "ratio": curves.ratio,
        }
        known = [row for row, curve in shown.items() if curve["value"].notna().any()]
        for row in known:
            *bands, line = curve_traces(
                shown[row],
                name,
                line_style(number),
                "%{y:.4g}",
                limit=limit,
                yaxis=_AXES[row],
                log=_LOG[row],
            )
            line.update(showlegend=row == known[0])
            for trace in (*bands, line):
                figure.add_trace(trace.update(legendgroup=name))
            observed[row] = True
    figure.layout.annotations[2].text = "spectral energy concentration SEC₁, mean of heads (share, 0 to 1)"
    figure.layout.annotations[0].text = "loss (smoothed as on the run's page)"
    _say_what_is_missing(figure, observed)
    return figure


def smoothing_span(loss: Curve) -> int:
    """Rows the drawn loss is averaged over: 1 % of the run, and none at all for a short one or one of means."""
    return max(5, len(loss) // 100) if len(loss) >= _SHORT_RUN and "low" not in loss else 1


def _solid(colour: str) -> dict[str, Any]:
    return {"color": colour, "width": 1.8}


def _stacked(uirevision: str) -> go.Figure:
    """Rows below each other that share the one x axis itself, so that zoom, spike and hover go through all."""
    height = _TOP_PX + _BOTTOM_PX + _ROW_PX * len(ROWS)
    figure = new_figure("", height, uirevision, hovermode="x unified", hoversubplots="axis")
    # The marks' axis spans all rows and lies on top of them: a filled background would hide the curves.
    figure.update_layout(margin={"t": _TOP_PX, "b": _BOTTOM_PX}, plot_bgcolor="rgba(0, 0, 0, 0)")
    band, gap = 1 / len(ROWS), 0.19 / len(ROWS)
    for number, row in enumerate(ROWS):
        top = 1 - number * band - gap
        domain = [max(0.0, 1 - (number + 1) * band), top]
        name = f"yaxis{number + 1 if number else ''}"
        figure.layout[name] = (log_axis if row.log else axis)(domain=domain, anchor="x")
        figure.add_annotation(
            text=row.title,
            x=0,
            xref="paper",
            xanchor="left",
            y=top,
            yref="paper",
            yanchor="bottom",
            showarrow=False,
            font={"size": 13},
            align="left",
            bgcolor="rgba(255, 255, 255, 0.75)",
        )
    figure.layout[f"yaxis{len(ROWS) + 1}"] = {
        "domain": [0, 1],
        "range": [0, 1],
        "visible": False,
        "fixedrange": True,
        "anchor": "x",
    }
    figure.layout.xaxis = axis(
        "step",
        anchor=_AXES["ratio"],
        showspikes=True,
        spikemode="across",
        spikecolor=GREY,
        spikethickness=1,
        spikedash="dot",
        hoverformat=",d",
        unifiedhovertitle={"text": "step %{x:,d}"},
        rangemode="nonnegative",
    )
    return figure


def _say_what_is_missing(figure: go.Figure, observed: Mapping[str, bool]) -> None:
    for row in ROWS:
        if not observed[row.key]:
            figure.add_annotation(
                text="not observed",
                x=0.5,
                xref="paper",
                y=0.5,
                yref=f"{_AXES[row.key]} domain",
                showarrow=False,
                font={"color": GREY, "size": 14},
            )


def _step_range(curves: RunCurves) -> tuple[int, int]:
    steps = [
        int(curve["step"].iloc[end]) for curve in (curves.loss, curves.ratio) if len(curve) for end in (0, -1)
    ]
    return (min(steps), max(steps)) if steps else (0, 1)
