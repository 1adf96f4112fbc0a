"""Figures over the step axis: one run's overview, several runs laid over each other. Pure: curves in, figure out."""

import html
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from .lines import curve_trace, limit_per_line
from .style import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    axis,
    line_style,
    log_axis,
    new_figure,
)
from .summary import Curve, Mark, NotFinite, RunCurves, TauSpan, smoothed

DEFAULT_TAU = 0.01
_ROW_PX = 165
_TOP_PX = 44
_BOTTOM_PX = 48
_SHORT_RUN = 60
_HOVER_WIDTH = 72
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
_MARK_AXIS = f"y{len(ROWS) + 1}"


def overview_figure(
    curves: RunCurves,
    marks: Sequence[Mark] = (),
    taus: Sequence[TauSpan] = (),
    *,
    uirevision: str = "overview",
) -> go.Figure:
    """Loss, entropy, SEC, logits and update ratio of one run, stacked on one step axis, with alerts and commands.

    Args:
        curves: the run's per-step summary.
        marks: events drawn as lines through every row.
        taus: when the spectral bound was armed; without any a dashed reference stands at `DEFAULT_TAU`.
        uirevision: zoom survives new data as long as this stays the same.
    """
    figure = _stacked(uirevision)
    span = smoothing_span(len(curves.loss))
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
        trace = curve_trace(curve, name, style, hover, yaxis=_AXES[row])
        # A row with one curve is named by its title.
        trace.showlegend = row in ("loss", "sec_max")
        figure.add_trace(trace)
    add_tau_lines(figure, taus, _AXES["ratio"], _step_range(curves), fired=curves.bound_fired)
    _add_not_finite(figure, curves.loss_not_finite)
    _add_marks(figure, marks)
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
        span = smoothing_span(len(curves.loss))
        shown: dict[str, Curve] = {
            "loss": smoothed(curves.loss, span) if span > 1 else curves.loss,
            "entropy": curves.entropy,
            "sec_max": curves.sec_mean,
            "logit": curves.logit,
            "ratio": curves.ratio,
        }
        known = [row for row, curve in shown.items() if curve["value"].notna().any()]
        for row in known:
            trace = curve_trace(
                shown[row], name, line_style(number), "%{y:.4g}", limit=limit, yaxis=_AXES[row]
            )
            trace.update(legendgroup=name, showlegend=row == known[0])
            figure.add_trace(trace)
            observed[row] = True
    figure.layout.annotations[2].text = "spectral energy concentration SEC₁, mean of heads (share, 0 to 1)"
    figure.layout.annotations[0].text = "loss (smoothed as on the run's page)"
    _say_what_is_missing(figure, observed)
    return figure


def smoothing_span(steps: int) -> int:
    """Rows the drawn loss is averaged over: 1 % of the run, and none at all for a short one."""
    return max(5, steps // 100) if steps >= _SHORT_RUN else 1


def add_tau_lines(
    figure: go.Figure, taus: Sequence[TauSpan], yaxis: str, steps: tuple[int, int], *, fired: bool
) -> None:
    """The line that the spectral bound keeps updates below; a dashed reference where its tau is not known.

    Args:
        figure: is added to.
        taus: when the bound was armed, as far as the run says so.
        yaxis: the axis of the update ratios.
        steps: the first and the last to draw.
        fired: whether a bound held back any update, armed in a way that the run did not record.
    """
    first_step, last_step = steps
    if not taus:
        why = "reference, the tau of the bound is not recorded" if fired else "not armed"
        name = f"tau {DEFAULT_TAU:g} ({why})"
        figure.add_trace(_tau_trace([first_step, last_step], [DEFAULT_TAU] * 2, name, yaxis, "dash"))
    for number, span in enumerate(taus):
        ends = [span.first_step, last_step if span.last_step is None else span.last_step]
        trace = _tau_trace(
            ends, [span.tau] * 2, f"tau {span.tau:g} from step {span.first_step}", yaxis, "solid"
        )
        trace.showlegend = number < 3  # noqa: PLR2004 - a bound that is set again and again must not flood the legend
        figure.add_trace(trace)


def _solid(colour: str) -> dict[str, Any]:
    return {"color": colour, "width": 1.8}


def _tau_trace(steps: list[int], values: list[float], name: str, yaxis: str, dash: str) -> go.Scatter:
    return go.Scatter(
        x=steps,
        y=values,
        name=name,
        mode="lines",
        xaxis="x",
        yaxis=yaxis,
        hoverinfo="skip",
        line={"color": SKY, "width": 2, "dash": dash},
    )


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


def _add_not_finite(figure: go.Figure, spans: Sequence[NotFinite]) -> None:
    """Shades the steps without a usable loss and says in words where they begin."""
    for number, span in enumerate(spans):
        figure.add_shape(
            type="rect",
            x0=span.first_step - 0.5,
            x1=span.last_step + 0.5,
            y0=0,
            y1=1,
            xref="x",
            yref=f"{_AXES['loss']} domain",
            fillcolor=VERMILION,
            opacity=0.18,
            line_width=0,
        )
        if number == 0:
            figure.add_annotation(
                text=f"loss is {span.shown} from step {span.first_step}",
                x=span.first_step,
                xref="x",
                y=0.9,
                yref=f"{_AXES['loss']} domain",
                xanchor="auto",
                ax=-40,
                ay=0,
                showarrow=True,
                arrowcolor=VERMILION,
                font={"color": VERMILION},
                bgcolor="white",
            )
    if spans:
        figure.add_trace(
            _mark_lines(
                [span.first_step for span in spans],
                [f"loss is {span.shown} from step {span.first_step} to {span.last_step}" for span in spans],
                "loss is not finite",
                {"color": VERMILION, "width": 1.5, "dash": "dot"},
            )
        )


_MARK_STYLES: tuple[tuple[str, str | None, str, dict[str, Any]], ...] = (
    ("alert", "critical", "alert (critical)", {"color": "#b2182b", "width": 1.6, "dash": "solid"}),
    ("alert", "warning", "alert (warning)", {"color": ORANGE, "width": 1.6, "dash": "dash"}),
    ("alert", "info", "alert (info, or cleared)", {"color": GREY, "width": 1.2, "dash": "dot"}),
    ("control", None, "control command", {"color": BLUE, "width": 1.8, "dash": "dashdot"}),
)


def _add_marks(figure: go.Figure, marks: Sequence[Mark]) -> None:
    for kind, severity, name, style in _MARK_STYLES:
        chosen = [mark for mark in marks if mark.kind == kind and severity in (None, mark.severity)]
        if chosen:
            texts: dict[int, list[str]] = {}
            for mark in chosen:
                texts.setdefault(mark.step, []).append(mark.text)
            figure.add_trace(
                _mark_lines(
                    list(texts), ["<br>".join(map(_wrapped, lines)) for lines in texts.values()], name, style
                )
            )


def _wrapped(text: str) -> str:
    """Plotly breaks no lines, and reads its own tags in texts that are none of ours."""
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(text, _HOVER_WIDTH))


def _mark_lines(steps: Sequence[int], texts: Sequence[str], name: str, style: dict[str, Any]) -> go.Scatter:
    """Vertical lines through all rows as one trace: they carry hover text and can be switched off in the legend."""
    x = np.repeat(np.asarray(steps, dtype=np.float64), 3)
    x[2::3] = np.nan
    return go.Scatter(
        x=x,
        y=np.tile([0.0, 1.0, np.nan], len(steps)),
        name=name,
        mode="lines",
        line=style,
        connectgaps=False,
        xaxis="x",
        yaxis=_MARK_AXIS,
        text=[text for text in texts for _ in range(3)],
        hovertemplate="%{text}",
    )


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
