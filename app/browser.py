"""The run browser: every run below the root in one sortable table; click one to open it, choose several to compare."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from diagnostics.errors import DiagnosticsError
from diagnostics.store.read import find_runs

from .data import READER, Reader
from .wording import labelled, plain

REFRESH_S = 3
# A thousand runs cannot be judged within one refresh: the rest is judged in the next ones.
JUDGING_BUDGET_S = 1.5
_LIVE = ("running", "stalled")
_TABLE_KEY = "runs-table"


def render(root: Path) -> None:
    """Draws the list of the runs below `root`.

    Args:
        root: directory the dashboard was started with.
    """
    st.header("Training Diagnostics", anchor=False)
    st.fragment(_listing, run_every=REFRESH_S)(root)


def run_rows(root: Path, reader: Reader) -> list[dict[str, Any]]:
    """One row per run, live ones first, then the newest; numbers are None where nothing was observed.

    Args:
        root: directory that holds runs.
        reader: cached reads; runs it cannot judge within `JUDGING_BUDGET_S` have status "…" this time.
    """
    deadline_s = time.monotonic() + JUDGING_BUDGET_S
    rows = [_row(root, path, reader, deadline_s) for path in find_runs(root)]
    return sorted(rows, key=lambda row: (row["state"] not in _LIVE, -(row["started_s"] or 0.0), row["run"]))


def _row(root: Path, path: Path, reader: Reader, deadline_s: float) -> dict[str, Any]:
    row: dict[str, Any] = {
        "run": path.relative_to(root).as_posix(),
        "state": "unreadable",
        "steps": None,
        "status": "no-data",
        "last loss": None,
        "lowest entropy": None,
        "highest mean SEC": None,
        "started_s": None,
        "problem": None,
    }
    try:
        info = reader.info(path)
        row |= {
            "state": info["state"],
            "steps": info.get("steps"),
            "started_s": info.get("started_s"),
            "status": "…",
        }
        live = info["state"] in _LIVE
        if live or reader.has_digest(path) or time.monotonic() < deadline_s:
            digest = reader.digest(path, live=live)
            row |= {
                "status": digest.status,
                "last loss": digest.last_loss,
                "lowest entropy": digest.lowest_entropy,
                "highest mean SEC": digest.highest_sec,
            }
    except DiagnosticsError as error:
        row["problem"] = str(error)
    return row


def _listing(root: Path) -> None:
    rows = run_rows(root, READER)
    if not rows:
        st.info(
            f'There is no run below {plain(str(root))} yet. Attach a `Recorder(model, optimizer, "{root}/NAME")` to a '
            "training loop, or make the demonstration runs with `diagnostics demo`; this page looks again every few "
            "seconds."
        )
        return
    names = [row["run"] for row in rows]
    chooser, button = st.columns([5, 1], vertical_alignment="bottom")
    chosen = chooser.multiselect(
        "Runs to open or compare",
        names,
        key="chosen-runs",
        placeholder="choose one to open, two or more to compare",
    )
    label = "Compare" if len(chosen) > 1 else "Open"
    if button.button(label, key="open-chosen", disabled=not chosen, type="primary", width="stretch"):
        _go(chosen)
    _table(rows)
    for row in rows:
        if row["problem"]:
            st.warning(row["problem"])


def _table(rows: list[dict[str, Any]]) -> None:
    st.caption("Click a row to open the run; click a column's title to sort.")
    frame = pd.DataFrame(rows)
    frame["started"] = [_local_time(value) for value in frame["started_s"]]
    frame["state"] = frame["state"].map(labelled)
    frame["status"] = frame["status"].map(labelled)
    columns = [
        "run",
        "state",
        "steps",
        "status",
        "last loss",
        "lowest entropy",
        "highest mean SEC",
        "started",
    ]
    config = st.column_config
    event = st.dataframe(
        frame[columns],
        key=_TABLE_KEY,
        hide_index=True,
        width="stretch",
        on_select="rerun",
        selection_mode="single-cell",
        placeholder="not observed",
        column_config={
            "run": config.TextColumn(pinned=True),
            "steps": config.NumberColumn(format="localized"),
            "last loss": config.NumberColumn(format="%.3f"),
            "lowest entropy": config.NumberColumn(
                "lowest entropy (nats)", format="%.3f", help="of any head, at any step"
            ),
            "highest mean SEC": config.NumberColumn(
                format="%.3f", help="SEC₁, mean over heads, highest of any step"
            ),
            "started": config.DatetimeColumn(format="YYYY-MM-DD HH:mm"),
        },
    )
    if event.selection.cells:
        _go([str(frame["run"].iloc[event.selection.cells[0][0]])])


def _go(names: list[str]) -> None:
    """To the page of one run or of several; the address says which, so that it can be sent to someone."""
    st.query_params.clear()
    st.query_params["run" if len(names) == 1 else "compare"] = names[0] if len(names) == 1 else names
    st.rerun(scope="app")


def _local_time(unix_s: float | None) -> datetime | None:
    return None if unix_s is None or pd.isna(unix_s) else datetime.fromtimestamp(unix_s, tz=UTC).astimezone()
