"""What is known about a run besides its curves: configuration, model, sites, what was skipped, faults, overhead."""

import json
from collections.abc import Mapping
from typing import Any

import pandas as pd
import streamlit as st

from .wording import plain


def render(info: Mapping[str, Any], steps: pd.DataFrame) -> None:
    """Draws the manifest in words and tables.

    Args:
        info: the manifest.
        steps: columns step, time_s, overhead_s.
    """
    st.markdown(plain(overhead_sentence(steps)))
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


def overhead_sentence(steps: pd.DataFrame) -> str:
    """The recorder's measured share of wall time, from the first closed step to the last.

    Args:
        steps: columns time_s and overhead_s, in step order.
    """
    if len(steps) < 2 or steps["overhead_s"].isna().all():  # noqa: PLR2004 - a duration needs two times
        return "Recorder overhead: not observed yet."
    # The first step's overhead lies before its time: it is left out of both.
    wall_s = float(steps["time_s"].iloc[-1] - steps["time_s"].iloc[0])
    spent_s = float(steps["overhead_s"].iloc[1:].sum())
    if not wall_s > 0:
        return "Recorder overhead: not observed yet."
    return f"Recorder overhead: {spent_s:.3g} s of {wall_s:,.3g} s wall time, {100 * spent_s / wall_s:.2f} %."


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
