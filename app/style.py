"""How every figure looks: colours that colour-blind people tell apart, and one light layout."""

from typing import Any

import plotly.graph_objects as go

# Okabe and Ito (2008), "Color Universal Design"; its yellow is left out: unreadable on white.
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#E69F00",
    "#CC79A7",
    "#56B4E9",
    "#222222",
)
PALETTE = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES = ("solid", "dash", "dot", "dashdot")
GREY = "#8a8f98"
GRID = "#e6e8eb"
NOT_OBSERVED = "#f1f2f4"
_NARROW_PX = 400
_LEGEND_ROW_PX = 20
_AXIS_PX = 46
_TITLE_PX = 44


def line_style(number: int) -> dict[str, Any]:
    """Colour and dash of the n-th line; the dash tells lines apart once the colours are used up."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "dash": DASHES[number // len(PALETTE) % len(DASHES)],
        "width": 1.8,
    }


def faded(colour: str, opacity: float) -> str:
    """A `#rrggbb` colour that lets through what lies behind it."""
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, {opacity})"


def new_figure(title: str, height: int, uirevision: str, **layout: Any) -> go.Figure:  # noqa: ANN401 - Plotly's
    """An empty figure in the common style.

    Args:
        title: shown above the figure.
        height: px.
        uirevision: zoom and legend choices survive new data as long as this stays the same.
        layout: further Plotly layout entries.
    """
    figure = go.Figure()
    figure.update_layout(
        title={"text": title, "x": 0, "xref": "paper", "xanchor": "left", "font": {"size": 16}},
        height=height,
        uirevision=uirevision,
        font={"family": "Source Sans, Source Sans Pro, sans-serif", "size": 13, "color": "#31333f"},
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin={"l": 58, "r": 12, "t": 64, "b": 48},
        legend={
            "orientation": "h",
            "x": 0,
            "xanchor": "left",
            "y": 1,
            "yanchor": "bottom",
            "font": {"size": 12},
        },
        hoverlabel={"namelength": -1},
        modebar={"remove": ["lasso2d", "select2d", "autoScale2d"]},
    )
    figure.update_layout(**layout)
    return figure


def legend_below(figure: go.Figure, entries: int, entry_px: int) -> None:
    """Moves the legend under the plot and makes room for it: many names fill several rows in a narrow window.

    Args:
        figure: with its height set.
        entries: how many lines are named.
        entry_px: about how wide a name is.
    """
    rows = -(-entries // max(1, _NARROW_PX // entry_px))
    plot_px = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
    figure.layout.height += _LEGEND_ROW_PX * rows
    figure.layout.legend.update(y=-_AXIS_PX / plot_px, yanchor="top")
    figure.layout.margin.t = _TITLE_PX


def axis(title: str = "", **more: Any) -> dict[str, Any]:  # noqa: ANN401 - Plotly's
    """An axis in the common style; `title` carries the unit."""
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": GRID,
        "zeroline": False,
        "linecolor": GREY,
        "ticks": "outside",
        "tickcolor": GREY,
        "ticklen": 4,
        "automargin": True,
        **more,
    }


def log_axis(title: str = "", **more: Any) -> dict[str, Any]:  # noqa: ANN401 - Plotly's
    return axis(title, type="log", tickformat="~g", **more)
