"""What is known about a run besides its curves: configuration, model, sites, what was skipped, faults, overhead."""

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import pandas as pd
import streamlit as st

from .wording import plain


def render(info: Mapping[str, Any], overhead: tuple[float, float] | None) -> None:
    """Draws the manifest in words and tables.

    Args:
        info: the manifest.
        overhead: the recorder's seconds and the wall time, None where they are not known yet.
    """
    st.markdown(plain(overhead_sentence(overhead)))
    _attempts(info)
    left, right = st.columns(2)
    _mapping(left, "Configuration", info.get("config"))
    _mapping(right, "Model", info.get("model"))
    _sites(info.get("sites") or [])
    skipped = info.get("skipped") or {}
    if skipped:
        st.subheader("Skipped modules", anchor=False)
        st.dataframe(
            pd.DataFrame({"module": list(skipped), "reason": [str(reason) for reason in skipped.values()]}),
            key="skipped",
            hide_index=True,
            width="stretch",
        )
    if faults := info.get("faults") or []:
        st.subheader("Faults of the recorder", anchor=False)
        for fault in faults:
            st.warning(plain(fault if isinstance(fault, str) else json.dumps(fault, default=str)))
    with st.expander("run.json", key="manifest"):
        st.json({key: value for key, value in info.items() if key != "metrics"}, expanded=1)


def overhead_sentence(overhead: tuple[float, float] | None) -> str:
    """The recorder's measured share of wall time, from the first closed step to the last.

    Args:
        overhead: seconds spent by the recorder, and seconds of wall time; None where they are not known yet.
    """
    if overhead is None or not overhead[1] > 0:
        return "Recorder overhead: not observed yet."
    spent_s, wall_s = overhead
    return f"Recorder overhead: {spent_s:.3g} s of {wall_s:,.3g} s wall time, {100 * spent_s / wall_s:.2f} %."


def _attempts(info: Mapping[str, Any]) -> None:
    attempts = info.get("attempts")
    if not isinstance(attempts, list) or len(attempts) < 2:  # noqa: PLR2004 - the first is the run itself
        return
    st.subheader("Attempts", anchor=False)
    st.caption("Steps that a later attempt computed again are shown as it computed them.")
    shown = ("attempt", "first_step", "state", "started_s", "ended_s", "error", "host")
    frame = pd.DataFrame([{key: entry.get(key) for key in shown} for entry in attempts])
    for column in ("started_s", "ended_s"):
        seconds = pd.to_numeric(frame.pop(column), errors="coerce")
        frame[column.removesuffix("_s")] = pd.to_datetime(seconds, unit="s", utc=True).dt.tz_convert(
            datetime.now().astimezone().tzinfo
        )
    times = dict.fromkeys(("started", "ended"), st.column_config.DatetimeColumn(format="YYYY-MM-DD HH:mm"))
    st.dataframe(frame, key="attempts", hide_index=True, width="stretch", placeholder="", column_config=times)


def _mapping(column: Any, title: str, values: object) -> None:  # noqa: ANN401 - Streamlit's container
    column.subheader(title, anchor=False)
    if not isinstance(values, Mapping) or not values:
        column.caption("none stored with the run")
        return
    frame = pd.DataFrame(
        {"name": [str(key) for key in values], "value": [_as_text(value) for value in values.values()]}
    )
    column.dataframe(frame, key=f"info-{title}", hide_index=True, width="stretch")


def _sites(sites: list[Mapping[str, Any]]) -> None:
    st.subheader("Attention sites", anchor=False)
    if not sites:
        st.caption("none found")
        return
    frame = pd.DataFrame([{key: _as_text(value) for key, value in site.items()} for site in sites])
    st.dataframe(frame, key="sites", hide_index=True, width="stretch")


def _as_text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "-"
    return value if isinstance(value, str) else json.dumps(value, default=str)
