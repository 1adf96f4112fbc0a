"""The lower part of a run's page: one section at a time, so that only what is looked at is computed and sent."""

from collections.abc import Callable
from datetime import datetime, tzinfo
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import streamlit as st

from . import run_info
from .data import READER
from .drawing import draw, shown_steps
from .head_charts import (
    HEAD_METRICS,
    HeadMetric,
    Pair,
    all_heads,
    head_lines_figure,
    heat_figure,
    layer_order,
    metric_range,
    spectrum_lines_figure,
    spectrum_map_figure,
)
from .head_map import MOST_COLUMNS, alarming, heads_over_steps_figure
from .series import curve_of, spliced, whole_buckets
from .summary import tau_spans
from .update_charts import largest_updates, scalar_figure, update_figure
from .verdict import verdict_on
from .wording import resolution_words

T = TypeVar("T")

_GRID, _MAP = "one step", "over training"
# What single steps are offered on a slider; of more, a person looks at the map and zooms.
_MOST_OFFERED = 5000
_UPDATE_METRICS = ("ratio", "scale")


def render(name: str, run: str) -> None:
    """Draws the section that is chosen.

    Args:
        name: the run's name; charts keep their zoom as long as it stays the same.
        run: its path or URI.
    """
    section = st.segmented_control(
        "Details", list(_SECTIONS), default=next(iter(_SECTIONS)), key="section", label_visibility="collapsed"
    )
    # None: the chosen button was clicked once more.
    _SECTIONS[section or next(iter(_SECTIONS))](name, run)


def _heat(name: str, run: str) -> None:
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    with left:
        metric = _metric("heat-metric")
    info = READER.info(run)
    long = READER.resolution(run, metric.table) > 1
    drawing = right.segmented_control(
        "Heads", [_GRID, _MAP], default=_MAP if long else _GRID, key="heat-drawing"
    )
    # Of a long run as many columns as the map has, or a slider offers.
    frame, resolution = READER.series(
        run, metric.table, (metric.column,), most=MOST_COLUMNS if long else None
    )
    if not _has_rows(frame, metric.table):
        return
    pairs = all_heads(info.get("sites") or [], frame)
    if drawing == _MAP:
        _head_map(name, run, metric, pairs, frame, resolution)
        return
    values = frame[["step", "layer", "head"]].assign(**{metric.column: alarming(frame, metric)})
    steps = np.unique(frame["step"].to_numpy()).tolist()
    step = _step(steps[-_MOST_OFFERED:], live=info["state"] == "running")
    figure = heat_figure(
        values[values["step"] == step],
        pairs,
        metric,
        step=step,
        last_step=step + resolution - 1 if resolution > 1 else None,
        scale=metric_range(values[metric.column]),
        uirevision=f"{name} {metric.column}",
    )
    draw(figure, "heat")
    st.caption(
        "One colour scale for the whole run, dark is the alarming end; a cross marks what was not observed."
    )


def _head_map(
    name: str, run: str, metric: HeadMetric, pairs: list[Pair], frame: pd.DataFrame, resolution: int
) -> None:
    revision = f"{name} {metric.column} map"
    span = shown_steps("head-map", revision)
    detail = None
    if span is not None and resolution > 1:
        span = whole_buckets(span, resolution)
        detail = (READER.series(run, metric.table, (metric.column,), span=span, most=MOST_COLUMNS)[0], span)
    figure = heads_over_steps_figure(frame, pairs, metric, detail=detail, uirevision=revision)
    draw(figure, "head-map", refines=resolution > 1)
    _say_resolution(resolution)


def _heads(name: str, run: str) -> None:
    metric = _metric("heads-metric")
    layers = _layers(run, metric.table)
    if not layers:
        _has_rows(pd.DataFrame(), metric.table)
        return
    layer = _choice(st, "Layer", layers, _worst(run)[0], "heads-layer")
    frame, resolution = READER.series(run, metric.table, (metric.column,), layer=layer)
    if not _has_rows(frame, metric.table):
        return
    revision = f"{name} {layer} {metric.column}"
    if resolution > 1 and (span := shown_steps("heads", revision)) is not None:
        span = whole_buckets(span, resolution)
        part = READER.series(run, metric.table, (metric.column,), span=span, layer=layer)[0]
        frame = spliced(frame, part, span)
    draw(head_lines_figure(frame, layer, metric, uirevision=revision), "heads", refines=resolution > 1)
    _say_resolution(resolution)


def _spectrum(name: str, run: str) -> None:
    frame, _ = READER.series(run, "spectra", ("sigma1",), most=MOST_COLUMNS)
    if not _has_rows(frame, "spectra"):
        return
    left, right = st.columns(2)
    worst_layer, worst_head = _worst(run)
    layers = layer_order([str(layer) for layer in frame["layer"].unique()])
    layer = _choice(left, "Layer", layers, worst_layer, "spectrum-layer")
    heads = sorted(int(head) for head in frame.loc[frame["layer"] == layer, "head"].unique())
    head = _choice(right, "Head", heads, worst_head if layer == worst_layer else None, "spectrum-head")
    quantity = left.segmented_control(
        "Quantity", ["singular values", "share of energy"], default="singular values", key="spectrum-quantity"
    )
    drawing = right.segmented_control("Drawn as", ["map", "lines"], default="map", key="spectrum-drawing")
    spectrum = READER.spectrum(run, layer, head)
    if spectrum.dropna(how="all").empty:
        st.info("No singular value of this head was observed.")
        return
    figure_of = spectrum_lines_figure if drawing == "lines" else spectrum_map_figure
    share = quantity == "share of energy"
    figure = figure_of(
        spectrum, f"{layer} head {head}", share=share, uirevision=f"{name} {layer} {head} {share} {drawing}"
    )
    draw(figure, f"spectrum-{drawing}")


def _updates(name: str, run: str) -> None:
    updates, resolution = READER.series(run, "updates", _UPDATE_METRICS)
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
    shown = chosen or largest_updates(updates, int(count))
    taus = tau_spans(READER.table(run, "events"), READER.info(run))
    if resolution > 1 and (span := shown_steps("updates", name)) is not None:
        span = whole_buckets(span, resolution)
        updates = spliced(updates, READER.series(run, "updates", _UPDATE_METRICS, span=span)[0], span)
    draw(update_figure(updates, shown, taus, uirevision=name), "updates", refines=resolution > 1)
    _say_resolution(resolution)


def _scalars(name: str, run: str) -> None:
    names = [column for column in READER.scalars(run) if column != "loss"]
    if not names:
        st.info("No scalar besides the loss: hand them in as `recorder.step(loss=loss, accuracy=accuracy)`.")
        return
    scalar = st.selectbox("Scalar", names, key="scalar")
    steps, resolution = READER.series(run, "steps", (scalar,))
    curve = curve_of(steps, scalar)
    revision = f"{name} {scalar}"
    if resolution == 1:
        # Measured at some steps only: rows between them are no gaps.
        curve = curve[curve["value"].notna() | steps["measured"].fillna(value=False).astype(bool)]
    elif (span := shown_steps("scalar-figure", revision)) is not None:
        span = whole_buckets(span, resolution)
        part = curve_of(READER.series(run, "steps", (scalar,), span=span)[0], scalar)
        curve = spliced(curve, part[part["value"].notna()], span)
    draw(scalar_figure(curve, scalar, uirevision=revision), "scalar-figure", refines=resolution > 1)
    _say_resolution(resolution)


def _events(_name: str, run: str) -> None:
    events = READER.table(run, "events")
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


def _info(_name: str, run: str) -> None:
    run_info.render(READER.info(run), READER.overhead(run))


_SECTIONS: dict[str, Callable[[str, str], None]] = {
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


def _layers(run: str, table: str) -> list[str]:
    """The layers of a table; of a long run, whose rows are not all read, those that its run.json names."""
    if READER.resolution(run, table) == 1:
        return layer_order([str(layer) for layer in READER.table(run, table)["layer"].unique()])
    return layer_order([str(site["name"]) for site in READER.info(run).get("sites") or []])


def _worst(run: str) -> tuple[str | None, int | None]:
    """The layer and head of the worst finding that names any: what a person looks for first."""
    report = verdict_on(run, READER.info(run)).report
    if report is not None:
        named = (finding for finding in report.findings if finding.layer is not None)
        return next(((finding.layer, finding.head) for finding in named), (None, None))
    events = READER.table(run, "events")
    alerts = events[(events["kind"] == "alert") & events["layer"].notna()]
    if alerts.empty:
        return None, None
    last = alerts.iloc[-1]
    return str(last["layer"]), None if pd.isna(last["head"]) else int(last["head"])


def _say_resolution(resolution: int) -> None:
    if resolution > 1:
        st.caption(resolution_words(resolution))


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
