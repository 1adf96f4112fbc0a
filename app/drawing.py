"""Draws a Plotly figure that follows new data in place.

`st.plotly_chart` makes its element's identity from the figure's content, so each new figure is a new
element: drawn from nothing, zoom and legend choices lost, every two seconds on a live run. This
component keeps its element as long as its key stays and hands new figures to `Plotly.react`. The
Plotly library itself is the one of the installed plotly package, served from there.
"""

from pathlib import Path

import plotly
import plotly.graph_objects as go
import streamlit as st
from streamlit.components.v1 import declare_component

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

export default function ({ data, parentElement }) {
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
  // Nothing of a run may leave this machine: no button that uploads a chart.
  const config = { displaylogo: false, showSendToCloud: false, responsive: false };
  library().then(
    (Plotly) => Plotly.react(plot, figure.data, { ...figure.layout, autosize: true }, config),
    (error) => { plot.textContent = error.message; },
  );
  return () => {
    if (plot.isConnected) return;
    plot.resized.disconnect();
    window.Plotly?.purge(plot);
  };
}
"""

_FIGURE = st.components.v2.component(
    "diagnostics_figure", js=_SCRIPT.replace("LIBRARY", _LIBRARY.name), isolate_styles=False
)


def draw(figure: go.Figure, key: str) -> None:
    """Draws a figure over the whole width, at the height of its layout.

    Args:
        figure: with `layout.height` and `layout.uirevision` set.
        key: unique on the page; the same plot is kept and updated as long as it stays.
    """
    _FIGURE(data=figure.to_json(), key=key)
