"""The page of one run: verdict first, then the overview on one step axis, then the details, then control."""

import shlex
from pathlib import Path
from typing import Any

import streamlit as st

from diagnostics.detect.finding import Finding
from diagnostics.report import Report

from . import run_details, steering
from .data import READER
from .drawing import draw
from .step_charts import overview_figure
from .summary import marks_of, tau_spans
from .wording import ago, badge, evidence, forecast, headline, labelled, plain, prose, verdict

LIVE_REFRESH_S = 2
STALLED_REFRESH_S = 10
_FINDINGS_SHOWN = 3
_ANY_RUN = "diagnostics control RUN"


def render(name: str, run_dir: Path, *, allow_control: bool, has_list: bool) -> None:
    """Draws one run's page.

    Args:
        name: the run's name in the address.
        run_dir: its directory.
        allow_control: whether the control panel is offered.
        has_list: whether there is a run list to go back to.
    """
    state = READER.info(run_dir)["state"]
    refresh_s = {"running": LIVE_REFRESH_S, "stalled": STALLED_REFRESH_S}.get(state)
    st.fragment(_summary, run_every=refresh_s)(name, run_dir, state, has_list=has_list)
    if allow_control and refresh_s is not None:
        st.fragment(steering.render, run_every=refresh_s)(run_dir)
    st.fragment(run_details.render, run_every=refresh_s)(name, run_dir)


def _summary(name: str, run_dir: Path, state_drawn: str, *, has_list: bool) -> None:
    info = READER.info(run_dir)
    if info["state"] != state_drawn:
        st.rerun(scope="app")  # what is refreshed, and whether there is a control panel, depends on the state
    report = READER.report(run_dir)
    _header(name, info, report, has_list=has_list)
    # One container, whatever it holds: a further finding must not move the chart to another place in the
    # page's tree, where the browser would draw it anew and lose the zoom.
    with st.container():
        _judgement(report, run_dir)
        if info.get("error"):
            st.error(f"The run ended with an error: {plain(str(info['error']))}")
        for file, reason in READER.damaged(run_dir).items():
            st.warning(f"Damaged and left out: {plain(file)}: {plain(reason)}")
    events = READER.table(run_dir, "events")
    curves = READER.curves(run_dir)
    if curves.loss.empty:
        st.info("The run has closed no step yet: charts appear with its first `recorder.step()`.")
        return
    figure = overview_figure(curves, marks_of(events), tau_spans(events, info), uirevision=name)
    draw(figure, "overview")


def _header(name: str, info: dict[str, Any], report: Report, *, has_list: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        if has_list and st.button("← All runs", key="back"):
            st.query_params.clear()
            st.rerun(scope="app")
        st.header(plain(name), anchor=False, width="content")
        for word in (info["state"], report.status):
            st.badge(labelled(word), color=badge(word).colour)
    steps = info.get("steps")
    st.caption(
        f"{'steps not known' if steps is None else f'{steps:,} steps'} · every {info.get('every', '?')} measured · "
        f"started {ago(info.get('started_s'))} · last sign of life {ago(info.get('heartbeat_s'))}"
    )


def _judgement(report: Report, run_dir: Path) -> None:
    show = {"green": st.success, "orange": st.warning, "red": st.error}.get(
        badge(report.status).colour, st.info
    )
    show(f"**{plain(verdict(report))}**")
    if report.forecast:
        st.warning(plain(forecast(report.forecast)))
    for finding in report.findings[:_FINDINGS_SHOWN]:
        _finding(finding, run_dir)
    if rest := report.findings[_FINDINGS_SHOWN:]:
        with st.expander(f"{len(rest)} more finding{'s' if len(rest) > 1 else ''}", key="more-findings"):
            for finding in rest:
                _finding(finding, run_dir)
    for sentence in report.missing:
        st.caption(f"Not judged: {plain(sentence)}")


def _finding(finding: Finding, run_dir: Path) -> None:
    with st.container(border=True, gap=None):
        st.markdown(f"**{plain(headline(finding))}** · {finding.severity}")
        if finding.evidence:
            st.markdown(f"Evidence: {plain(evidence(finding.evidence))}")
        if finding.advice:
            typed = finding.advice.replace(
                _ANY_RUN, f"{_ANY_RUN.removesuffix('RUN')}{shlex.quote(str(run_dir))}"
            )
            st.markdown(f"Advice: {prose(typed)}")
