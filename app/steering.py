"""The control panel of a live run: a form into its mailbox, and what the run itself answered."""

import shlex
from pathlib import Path
from typing import Any

import streamlit as st

from diagnostics.control.commands import as_typed
from diagnostics.control.mailbox import acknowledgement, read_journal, send
from diagnostics.errors import DiagnosticsError

from .wording import plain

_SENT = "commands-sent"
_ANSWERS_SHOWN = 5
_BOUND = "spectral-bound"


def render(run: str) -> None:
    """Draws the panel.

    Args:
        run: the path of a run on this machine.
    """
    run_dir = Path(run)
    with st.expander("Control", expanded=True, key="control-panel"):
        tau_column, arm_column, disarm_column = st.columns([2, 1, 1], vertical_alignment="bottom")
        tau = tau_column.number_input(
            "tau: largest σ₁(ΔW) / σ₁(W) an update may have",
            min_value=1e-6,
            max_value=10.0,
            value=0.01,
            step=0.005,
            format="%g",
            key="control-tau",
        )
        if arm_column.button("Arm spectral bound", key="control-arm", type="primary", width="stretch"):
            _send(run_dir, _BOUND, {"tau": tau})
        if disarm_column.button("Disarm", key="control-disarm", width="stretch"):
            _send(run_dir, "disarm", {"name": _BOUND})
        _answers(run_dir)


def _send(run_dir: Path, command: str, arguments: dict[str, Any]) -> None:
    try:
        identity = send(run_dir, command, arguments)
    except DiagnosticsError as error:
        st.error(str(error))
        return
    st.session_state.setdefault(_SENT, []).append(
        (str(run_dir), identity, as_typed(command, arguments, shlex.quote(str(run_dir))))
    )


def _answers(run_dir: Path) -> None:
    """Only what the run wrote counts as done; until then a command is merely sent."""
    mine = {
        identity: typed
        for sent_to, identity, typed in st.session_state.get(_SENT, [])
        if sent_to == str(run_dir)
    }
    for identity, typed in list(mine.items())[-_ANSWERS_SHOWN:]:
        record = acknowledgement(run_dir, identity)
        if record is None:
            st.info(f"`{typed}`: sent, the run has not answered yet")
        elif record["status"] == "applied":
            st.success(f"`{typed}`: {plain(answer(record))}")
        else:
            st.error(f"`{typed}`: {plain(answer(record))}")
    others = [
        record for record in read_journal(run_dir) if record.get("id") not in mine and record.get("status")
    ]
    for record in others[-_ANSWERS_SHOWN:]:
        st.caption(
            f"{plain(str(record.get('command') or 'a command'))} from elsewhere: {plain(answer(record))}"
        )


def answer(record: dict[str, Any]) -> str:
    """`applied at step 120; before: armed no; after: armed yes, tau 0.01`, from a record of the run's journal."""
    words = [str(record.get("status"))]
    if record.get("step") is not None:
        words[0] += f" at step {record['step']:,}"
    words += [
        f"{key}: {_short(record[key])}"
        for key in ("before", "after", "reason")
        if record.get(key) not in (None, "")
    ]
    return "; ".join(words)


def _short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(item)}" for key, item in value.items()) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
