"""The run browser: every run below the root in one sortable table; click one to open it, choose several to compare."""

from datetime import UTC, datetime
from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

from diagnostics.store.place import is_uri

from .aside import ASIDE, Aside
from .digest import Digest, digest_of, recorded_status
from .listing import LISTING, Listed, Listing
from .wording import labelled, plain

REFRESH_S = 3
# A list of what lies behind a URI is an answer of its server, and may be a bill.
REMOTE_REFRESH_S = 30
# A few runs without a summary are read within this time, so that the first table is whole.
FIRST_LOOK_S = 0.5
PENDING = "…"
# As high as Streamlit draws them: a thousand runs scroll within the table, and it fills a laptop's window.
_ROWS_SHOWN = 18
_ROW_PX, _HEADER_PX = 35, 38
_LIVE = ("running", "stalled")
_TABLE_KEY = "runs-table"


def render(root: str) -> None:
    """Draws the list of the runs below `root`.

    Args:
        root: directory or URI that the dashboard was started with.
    """
    st.header("Training Diagnostics", anchor=False)
    st.fragment(_listing, run_every=REMOTE_REFRESH_S if is_uri(root) else REFRESH_S)(root)


def run_rows(
    root: str, listing: Listing = LISTING, aside: Aside = ASIDE, wait_s: float = 0.0
) -> list[dict[str, Any]]:
    """One row per run, live ones first, then the newest; numbers are None where nothing was observed.

    Everything comes from the runs' run.json. A run whose run.json holds no summary, as older recorders wrote
    none, is read beside the page: until then its status is `PENDING`.

    Args:
        root: directory or URI that holds runs.
        listing: reads the manifests.
        aside: reads the runs without a summary.
        wait_s: how long to wait for it.
    """
    listed = sorted(
        listing.runs(root),
        key=lambda one: (
            one.info.get("state") not in _LIVE,
            -float(one.info.get("started_s") or 0.0),
            one.name,
        ),
    )
    unread = [one for one in listed if one.problem is None and _needs_reading(one.info)]
    # What is asked for last is done first: the uppermost rows.
    for one in reversed(unread):
        aside.ask(("digest", one.run), one.stamp, partial(digest_of, one.run))
    if wait_s and unread:
        aside.wait(wait_s)
    return [_row(one, aside) for one in listed]


def _needs_reading(info: dict[str, Any]) -> bool:
    return not isinstance(info.get("summary"), dict) or recorded_status(info) is None


def _row(one: Listed, aside: Aside) -> dict[str, Any]:
    info = one.info
    row: dict[str, Any] = {
        "run": one.name,
        "state": info.get("state", "unreadable"),
        "attempt": info.get("attempt") or 1,
        "steps": info.get("steps"),
        "status": "no-data" if one.problem else PENDING,
        "last loss": None,
        "lowest entropy": None,
        "highest mean SEC": None,
        "started_s": info.get("started_s"),
        "problem": one.problem,
    }
    if one.problem:
        return row
    digest = Digest.recorded(info)
    if digest is None or digest.status is None:
        read = aside.result(("digest", one.run))
        if isinstance(read, Digest):
            digest = read
        elif isinstance(read, str):
            row |= {"problem": read, "status": "no-data"}
    if digest is not None:
        row |= {
            "status": digest.status or PENDING,
            "last loss": digest.last_loss,
            "lowest entropy": digest.lowest_entropy,
            "highest mean SEC": digest.highest_sec,
        }
    return row


def _listing(root: str) -> None:
    rows = run_rows(root, wait_s=FIRST_LOOK_S)
    if not rows:
        st.info(
            f'There is no run below {plain(root)} yet. Attach a `Recorder(model, optimizer, "{root}/NAME")` to a '
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
    pending = sum(row["status"] == PENDING for row in rows)
    reading = f" Still reading {pending:,} of them." if pending else ""
    counted = f"{len(rows):,} run{'s' if len(rows) > 1 else ''}. "
    st.caption(f"{counted}Click a row to open the run; click a column's title to sort.{reading}")
    _table(rows)
    for row in rows:
        if row["problem"]:
            st.warning(plain(row["problem"]))


def _table(rows: list[dict[str, Any]]) -> None:
    frame = pd.DataFrame(rows)
    frame["started"] = [_local_time(value) for value in frame["started_s"]]
    frame["state"] = [
        labelled(row["state"]) + (f", attempt {row['attempt']}" if row["attempt"] != 1 else "")
        for row in rows
    ]
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
        height=_HEADER_PX + _ROW_PX * min(len(rows), _ROWS_SHOWN),
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
