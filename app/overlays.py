"""What lies over the curves of a step figure: the tau line, alerts and commands, steps without a usable loss."""

import html
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from .style import BLACK, BLUE, GREY, ORANGE, SKY, VERMILION
from .summary import Mark, NotFinite, TauSpan

DEFAULT_TAU = 0.01
_HOVER_WIDTH = 72
_MOST_SHADED = 100


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


def add_not_finite(figure: go.Figure, spans: Sequence[NotFinite], row_axis: str, mark_axis: str) -> None:
    """Shades the steps without a usable loss and says in words where they begin.

    Args:
        figure: is added to.
        spans: in step order.
        row_axis: the y axis of the loss.
        mark_axis: the y axis from 0 to 1 that spans all rows.
    """
    for number, span in enumerate(spans[:_MOST_SHADED]):
        figure.add_shape(
            type="rect",
            x0=span.first_step - 0.5,
            x1=span.last_step + 0.5,
            y0=0,
            y1=1,
            xref="x",
            yref=f"{row_axis} domain",
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
                yref=f"{row_axis} domain",
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
                mark_axis,
            )
        )


_MARK_STYLES: tuple[tuple[str, str | None, str, dict[str, Any]], ...] = (
    ("alert", "critical", "alert (critical)", {"color": "#b2182b", "width": 1.6, "dash": "solid"}),
    ("alert", "warning", "alert (warning)", {"color": ORANGE, "width": 1.6, "dash": "dash"}),
    ("alert", "info", "alert (info, or cleared)", {"color": GREY, "width": 1.2, "dash": "dot"}),
    ("control", None, "control command", {"color": BLUE, "width": 1.8, "dash": "dashdot"}),
    ("attempt", None, "resumed", {"color": BLACK, "width": 1.4, "dash": "longdash"}),
)


def add_marks(figure: go.Figure, marks: Sequence[Mark], mark_axis: str) -> None:
    """Alerts, commands and resumes as vertical lines, one trace per kind.

    Args:
        figure: is added to.
        marks: in step order.
        mark_axis: the y axis from 0 to 1 that spans all rows.
    """
    for kind, severity, name, style in _MARK_STYLES:
        chosen = [mark for mark in marks if mark.kind == kind and severity in (None, mark.severity)]
        if chosen:
            texts: dict[int, list[str]] = {}
            for mark in chosen:
                texts.setdefault(mark.step, []).append(mark.text)
            figure.add_trace(
                _mark_lines(
                    list(texts),
                    ["<br>".join(map(_wrapped, lines)) for lines in texts.values()],
                    name,
                    style,
                    mark_axis,
                )
            )


def _wrapped(text: str) -> str:
    """Plotly breaks no lines, and reads its own tags in texts that are none of ours."""
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(text, _HOVER_WIDTH))


def _mark_lines(
    steps: Sequence[int], texts: Sequence[str], name: str, style: dict[str, Any], yaxis: str
) -> go.Scatter:
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
        yaxis=yaxis,
        text=[text for text in texts for _ in range(3)],
        hovertemplate="%{text}",
    )
