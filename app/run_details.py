"""The lower part of a run's page: one section at a time, so that only what is looked at is computed and sent."""

from collections.abc import Callable
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import streamlit as st

from . import run_info
from .data import READER
from .drawing import draw
from .head_charts import (
    HEAD_METRICS,
    HeadMetric,
    all_heads,
    head_lines_figure,
    heat_figure,
    layer_order,
    metric_range,
    spectrum_lines_figure,
    spectrum_map_figure,
)
from .summary import tau_spans
from .update_charts import largest_updates, scalar_figure, update_figure

T = TypeVar("T")

_TABLE_COLUMNS = ("step", "time_s", "loss", "measured", "overhead_s", "loss_not_finite")


def render(name: str, run_dir: Path) -> None:
    """Draws the section that is chosen.

    Args:
        name: the run's name; charts keep their zoom as long as it stays the same.
        run_dir: its directory.
    """
    section = st.segmented_control(
        "Details", list(_SECTIONS), default=next(iter(_SECTIONS)), key="section", label_visibility="collapsed"
    )
    # None: the chosen button was clicked once more.
    _SECTIONS[section or next(iter(_SECTIONS))](name, run_dir)


def _heat(name: str, run_dir: Path) -> None:
    metric = _metric("heat-metric")
    frame = READER.table(run_dir, metric.table)
    if not _has_rows(frame, metric.table):
        return
    info = READER.info(run_dir)
    step = _step(sorted(int(value) for value in frame["step"].unique()), live=info["state"] == "running")
    figure = heat_figure(
        frame[frame["step"] == step],
        all_heads(info.get("sites") or [], frame),
        metric,
        step=step,
        scale=metric_range(frame[metric.column]),
        uirevision=f"{name} {metric.column}",
    )
    draw(figure, "heat")
    st.caption(
        "One colour scale for the whole run, dark is the alarming end; a cross marks what was not observed."
    )


def _heads(name: str, run_dir: Path) -> None:
    metric = _metric("heads-metric")
    frame = READER.table(run_dir, metric.table)
    if not _has_rows(frame, metric.table):
        return
    layer = _choice(
        st, "Layer", layer_order([str(x) for x in frame["layer"].unique()]), _worst(run_dir)[0], "heads-layer"
    )
    figure = head_lines_figure(
        frame[frame["layer"] == layer], layer, metric, uirevision=f"{name} {layer} {metric.column}"
    )
    draw(figure, "heads")


def _spectrum(name: str, run_dir: Path) -> None:
    frame = READER.table(run_dir, "spectra")
    if not _has_rows(frame, "spectra"):
        return
    left, right = st.columns(2)
    worst_layer, worst_head = _worst(run_dir)
    layers = layer_order([str(layer) for layer in frame["layer"].unique()])
    layer = _choice(left, "Layer", layers, worst_layer, "spectrum-layer")
    heads = sorted(int(head) for head in frame.loc[frame["layer"] == layer, "head"].unique())
    head = _choice(right, "Head", heads, worst_head if layer == worst_layer else None, "spectrum-head")
    quantity = left.segmented_control(
        "Quantity", ["singular values", "share of energy"], default="singular values", key="spectrum-quantity"
    )
    drawing = right.segmented_control("Drawn as", ["map", "lines"], default="map", key="spectrum-drawing")
    spectrum = READER.spectrum(run_dir, layer, head)
    if spectrum.dropna(how="all").empty:
        st.info("No singular value of this head was observed.")
        return
    figure_of = spectrum_lines_figure if drawing == "lines" else spectrum_map_figure
    share = quantity == "share of energy"
    figure = figure_of(
        spectrum, f"{layer} head {head}", share=share, uirevision=f"{name} {layer} {head} {share} {drawing}"
    )
    draw(figure, f"spectrum-{drawing}")


def _updates(name: str, run_dir: Path) -> None:
    updates = READER.table(run_dir, "updates")
    if not _has_rows(updates, "updates"):
        return
    known = sorted(str(parameter) for parameter in updates["parameter"].unique())
    left, right = st.columns([1, 3])
    count = left.number_input("Largest", min_value=1, max_value=50, value=10, key="updates-count")
    chosen = right.multiselect(
        "or these parameters",
        known,
        key="updates-parameters",
        placeholder="the ones with the largest ratio at any step",
    )
    taus = tau_spans(READER.table(run_dir, "events"), READER.info(run_dir))
    figure = update_figure(updates, chosen or largest_updates(updates, int(count)), taus, uirevision=name)
    draw(figure, "updates")


def _scalars(name: str, run_dir: Path) -> None:
    steps = READER.table(run_dir, "steps")
    names = [
        column for column in steps.columns if column not in _TABLE_COLUMNS and steps[column].notna().any()
    ]
    if not names:
        st.info("No scalar besides the loss: hand them in as `recorder.step(loss=loss, accuracy=accuracy)`.")
        return
    scalar = st.selectbox("Scalar", names, key="scalar")
    curve = pd.DataFrame({"step": steps["step"], "value": steps[scalar].astype("float64")})
    # Measured at some steps only: rows between them are no gaps.
    observed = curve[curve["value"].notna() | steps["measured"].fillna(value=False).astype(bool)]
    draw(scalar_figure(observed, scalar, uirevision=f"{name} {scalar}"), "scalar-figure")


def _events(_name: str, run_dir: Path) -> None:
    events = READER.table(run_dir, "events")
    if events.empty:
        st.info("No alert, command, warning or fault so far.")
        return
    shown = events.iloc[::-1].copy()
    shown.insert(
        1, "time", pd.to_datetime(shown.pop("time_s"), unit="s", utc=True).dt.tz_convert(_local_zone())
    )
    st.dataframe(
        shown,
        key="events",
        hide_index=True,
        width="stretch",
        placeholder="",
        column_config={
            "time": st.column_config.DatetimeColumn(format="HH:mm:ss"),
            "step": st.column_config.NumberColumn(format="localized"),
        },
    )


def _info(_name: str, run_dir: Path) -> None:
    run_info.render(READER.info(run_dir), READER.table(run_dir, "steps"))


_SECTIONS: dict[str, Callable[[str, Path], None]] = {
    "Layers and heads": _heat,
    "Heads over training": _heads,
    "Singular spectrum": _spectrum,
    "Updates": _updates,
    "Other scalars": _scalars,
    "Events": _events,
    "Run": _info,
}


def _metric(key: str) -> HeadMetric:
    return st.selectbox("Metric", HEAD_METRICS, format_func=lambda metric: metric.label, key=key)


def _worst(run_dir: Path) -> tuple[str | None, int | None]:
    """The layer and head of the worst finding that names any: what a person looks for first."""
    named = (finding for finding in READER.report(run_dir).findings if finding.layer is not None)
    return next(((finding.layer, finding.head) for finding in named), (None, None))


def _choice(place: Any, label: str, options: list[T], first: T | None, key: str) -> T:  # noqa: ANN401 - Streamlit's
    """A select box that starts at `first`, where that is an option, and then keeps what a person chose."""
    if key not in st.session_state and first in options:
        st.session_state[key] = first
    chosen: T = place.selectbox(label, options, key=key)
    return chosen


def _step(steps: list[int], *, live: bool) -> int:
    """The measured step to show. On a live run the newest, until a person holds one."""
    if len(steps) == 1:
        st.caption(f"step {steps[0]:,} is the only measured one so far")
        return steps[0]
    if live:
        if st.toggle("follow the newest step", value=True, key="heat-follow"):
            st.session_state.pop("heat-held", None)
            return steps[-1]
        # Steps that arrive while a person drags would rebuild the slider under their hand.
        steps = st.session_state.setdefault("heat-held", steps)
    return int(
        st.select_slider(
            "Step", steps, value=steps[-1], key="heat-step", format_func=lambda step: f"{step:,}"
        )
    )


def _has_rows(frame: pd.DataFrame, table: str) -> bool:
    if frame.empty:
        st.info(f"Nothing was recorded in the {table} table (so far): it fills at the measured steps.")
    return not frame.empty


def _local_zone() -> tzinfo | None:
    return datetime.now().astimezone().tzinfo
