"""Several runs laid over each other on one step axis, and in one table."""

from typing import Any

import pandas as pd
import streamlit as st

from .data import READER
from .drawing import draw
from .step_charts import compare_figure
from .summary import RunCurves, highest, last_value, lowest
from .verdict import verdict_on
from .wording import labelled

REFRESH_S = 3


def render(runs: dict[str, str], chosen: list[str]) -> None:
    """Draws the comparison.

    Args:
        runs: name to path or URI of every run below the root.
        chosen: names of the runs to compare.
    """
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        if st.button("← All runs", key="back"):
            st.query_params.clear()
            st.rerun()
        st.header("Runs compared", anchor=False, width="content")
    names = st.multiselect("Runs", list(runs), default=chosen, key="compared-runs")
    if names and names != chosen:
        st.query_params["compare"] = names
    if not names:
        st.info("Choose two or more runs.")
        return
    live = any(READER.info(runs[name])["state"] == "running" for name in names)
    st.fragment(_comparison, run_every=REFRESH_S if live else None)({name: runs[name] for name in names})


def comparison_rows(runs: dict[str, str]) -> list[dict[str, Any]]:
    """One row per run; None where nothing was observed."""
    return [_row(name, path, READER.curves(path)) for name, path in runs.items()]


def _row(name: str, run: str, curves: RunCurves) -> dict[str, Any]:
    info = READER.info(run)
    return {
        "run": name,
        "state": labelled(info["state"]),
        "status": labelled(verdict_on(run, info).status),
        "last step": None if curves.loss.empty else _last_step(info, curves),
        "final loss": last_value(curves.loss),
        "lowest entropy": lowest(curves.entropy),
        "mean SEC": last_value(curves.sec_mean),
        "largest logit": highest(curves.logit),
    }


def _last_step(info: dict[str, Any], curves: RunCurves) -> int:
    drawn = int(curves.loss["step"].iloc[-1])
    # Of many steps the last point is a bucket's first.
    return max(drawn, int(info.get("steps") or 0) - 1) if curves.resolution > 1 else drawn


def _comparison(runs: dict[str, str]) -> None:
    config = st.column_config
    st.dataframe(
        pd.DataFrame(comparison_rows(runs)),
        key="comparison-table",
        hide_index=True,
        width="stretch",
        placeholder="not observed",
        column_config={
            "run": config.TextColumn(pinned=True),
            "last step": config.NumberColumn(format="localized"),
            "final loss": config.NumberColumn(format="%.3f"),
            "lowest entropy": config.NumberColumn(
                "lowest entropy (nats)", format="%.3f", help="of any head, at any step"
            ),
            "mean SEC": config.NumberColumn(
                format="%.3f", help="SEC₁, mean over heads, at the last measured step"
            ),
            "largest logit": config.NumberColumn(format="%.1f", help="of any head, at any step"),
        },
    )
    figure = compare_figure(
        {name: READER.curves(path) for name, path in runs.items()}, uirevision=" ".join(runs)
    )
    draw(figure, "compare-figure")
