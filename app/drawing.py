"""Draws a Plotly figure that follows new data in place, and says which steps a person looks at.

`st.plotly_chart` makes its element's identity from the figure's content, so each new figure is a new
element: drawn from nothing, zoom and legend choices lost, every two seconds on a live run. This
component keeps its element as long as its key stays and hands new figures to `Plotly.react`. The
Plotly library itself is the one of the installed plotly package, served from there.
"""

from collections.abc import Mapping
from pathlib import Path

import plotly
import plotly.graph_objects as go
import streamlit as st
from streamlit.components.v1 import declare_component

from .series import Span

# Declaring a component serves its folder below component/<module>.<name>/.
_LIBRARY = declare_component("library", path=Path(plotly.__file__).parent / "package_data")

_SCRIPT = """
const address = new URL("component/LIBRARY/plotly.min.js", document.baseURI).href;

function library() {
  window.diagnosticsPlotly ??= new Promise((resolve, reject) => {
    const script = document.createElement("script");
    script.src = address;
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error(`${address} cannot be loaded`));
    document.head.append(script);
  });
  return window.diagnosticsPlotly;
}

// The steps on screen, told once a person has stopped moving; null: all of them.
function tell(plot) {
  clearTimeout(plot.telling);
  plot.telling = setTimeout(() => {
    const axis = plot._fullLayout?.xaxis;
    if (!axis || !plot.tellSteps) return;
    const shown = axis.autorange ? null : axis.range.map(Math.round);
    const told = JSON.stringify([shown, plot.revision]);
    if (told === plot.told || (shown === null && plot.told === undefined)) return;
    plot.told = told;
    plot.tellSteps("shown", { steps: shown, of: plot.revision });
  }, 300);
}

export default function ({ data, parentElement, setStateValue }) {
  let plot = parentElement.querySelector(".figure");
  if (!plot) {
    plot = document.createElement("div");
    plot.className = "figure";
    parentElement.append(plot);
    plot.resized = new ResizeObserver(() => window.Plotly && plot.data && window.Plotly.Plots.resize(plot));
    plot.resized.observe(plot);
  }
  const figure = JSON.parse(data);
  plot.style.height = `${figure.layout.height}px`;
  plot.tellSteps = figure.layout.meta?.refines ? setStateValue : null;
  plot.revision = figure.layout.uirevision;
  // Nothing of a run may leave this machine: no button that uploads a chart.
  const config = { displaylogo: false, showSendToCloud: false, responsive: false };
  library().then(
    (Plotly) => {
      Plotly.react(plot, figure.data, { ...figure.layout, autosize: true }, config);
      if (!plot.heard) plot.on("plotly_relayout", () => tell(plot));
      plot.heard = true;
    },
    (error) => { plot.textContent = error.message; },
  );
  return () => {
    if (plot.isConnected) return;
    clearTimeout(plot.telling);
    plot.resized.disconnect();
    window.Plotly?.purge(plot);
  };
}
"""

_FIGURE = st.components.v2.component(
    "diagnostics_figure", js=_SCRIPT.replace("LIBRARY", _LIBRARY.name), isolate_styles=False
)


def draw(figure: go.Figure, key: str, *, refines: bool = False) -> None:
    """Draws a figure over the whole width, at the height of its layout.

    Args:
        figure: with `layout.height` and `layout.uirevision` set.
        key: unique on the page; the same plot is kept and updated as long as it stays.
        refines: a zoom runs the fragment again; `shown_steps` then says to which steps.
    """
    figure.layout.meta = {"refines": refines}
    _FIGURE(data=figure.to_json(), key=key, on_shown_change=_heard)


def shown_steps(key: str, uirevision: str) -> Span | None:
    """The range of steps that a person has zoomed a figure to; None: the whole of it.

    Args:
        key: the figure's.
        uirevision: the one it will be drawn with; of what was another figure before, nothing is known.
    """
    state = st.session_state.get(key)
    shown = state.get("shown") if isinstance(state, Mapping) else None
    if not isinstance(shown, Mapping) or shown.get("of") != uirevision or not shown.get("steps"):
        return None
    first, last = sorted(int(step) for step in shown["steps"])
    return max(0, first), max(0, last)


def _heard() -> None:
    """Streamlit keeps the states of a component only where someone listens."""
