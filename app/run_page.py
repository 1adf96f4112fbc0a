"""The page of one run: verdict first, then the overview on one step axis, then the details, then control."""

import shlex
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import streamlit as st

from diagnostics.detect.finding import Finding
from diagnostics.report import Report

from . import run_details, steering
from .aside import ASIDE
from .data import READER, ROUGH_POINTS
from .drawing import draw, shown_steps
from .step_charts import overview_figure
from .summary import marks_of, resumes, tau_spans
from .verdict import Verdict, verdict_on
from .wording import (
    ago,
    badge,
    evidence,
    forecast,
    headline,
    labelled,
    plain,
    prose,
    resolution_words,
    verdict,
)

LIVE_REFRESH_S = 2
# A picture of thousands of points changes little in a second, and is a megabyte to send.
LONG_REFRESH_S = 6
STALLED_REFRESH_S = 10
AWAITED_REFRESH_S = 1
_FINDINGS_SHOWN = 3
_ALERTS_SHOWN = 5
_ASKED = "judging-asked-for"
_ANY_RUN = "diagnostics control RUN"


def render(name: str, run: str, *, allow_control: bool, has_list: bool) -> None:
    """Draws one run's page.

    Args:
        name: the run's name in the address.
        run: its path or URI.
        allow_control: whether the control panel is offered.
        has_list: whether there is a run list to go back to.
    """
    info = READER.info(run)
    live_s = LONG_REFRESH_S if READER.resolution(run, "steps") > 1 else LIVE_REFRESH_S
    refresh_s = {"running": live_s, "stalled": STALLED_REFRESH_S}.get(info["state"])
    drawn = _stage(run, info)
    awaited_s = AWAITED_REFRESH_S if drawn.awaited else None
    st.fragment(_summary, run_every=awaited_s or refresh_s)(name, run, drawn, has_list=has_list)
    if allow_control and refresh_s is not None:
        st.fragment(steering.render, run_every=refresh_s)(run)
    st.fragment(run_details.render, run_every=refresh_s)(name, run)


@dataclass(frozen=True)
class _Stage:
    """What the page's frame depends on: what is refreshed how often, and whether there is a control panel."""

    state: str
    judging: bool
    rough: bool

    @property
    def awaited(self) -> bool:
        """Whether more will be known in a moment."""
        return self.judging or self.rough


def _stage(run: str, info: dict[str, Any]) -> _Stage:
    return _Stage(str(info["state"]), _verdict(run, info).under_way, READER.refinable(run))


def _summary(name: str, run: str, drawn: _Stage, *, has_list: bool) -> None:
    info = READER.info(run)
    judged = _verdict(run, info)
    stage = _stage(run, info)
    if stage != drawn:
        st.rerun(scope="app")
    _header(name, info, judged, has_list=has_list)
    events = READER.table(run, "events")
    # One container, whatever it holds: a further finding must not move the chart to another place in the
    # page's tree, where the browser would draw it anew and lose the zoom.
    with st.container():
        if judged.report is not None:
            _judgement(judged.report, run)
        else:
            _until_judged(judged, run, events)
        if info.get("error"):
            st.error(f"The run ended with an error: {plain(str(info['error']))}")
        for file, reason in READER.damaged(run).items():
            st.warning(f"Damaged and left out: {plain(file)}: {plain(reason)}")
        for mark in resumes(info):
            st.caption(plain(f"{mark.text}."))
    most = ROUGH_POINTS if stage.rough else None
    curves = READER.curves(run, shown_steps("overview", name), most=most)
    if curves.loss.empty:
        st.info("The run has closed no step yet: charts appear with its first `recorder.step()`.")
        return
    marks = (*marks_of(events), *resumes(info))
    figure = overview_figure(curves, marks, tau_spans(events, info), uirevision=name)
    draw(figure, "overview", refines=curves.resolution > 1)
    if curves.resolution > 1:
        st.caption(resolution_words(curves.resolution))
    if stage.rough:
        # Only now: the first picture shares neither disk nor processor with the finer one.
        ASIDE.ask(("curves", run), time.monotonic(), partial(READER.refine, run))


def _verdict(run: str, info: dict[str, Any]) -> Verdict:
    return verdict_on(run, info, asked=st.session_state.get(_ASKED) == run)


def _header(name: str, info: dict[str, Any], judged: Verdict, *, has_list: bool) -> None:
    with st.container(horizontal=True, vertical_alignment="center", gap="small"):
        if has_list and st.button("← All runs", key="back"):
            st.query_params.clear()
            st.rerun(scope="app")
        st.header(plain(name), anchor=False, width="content")
        for word in (info["state"], judged.status):
            st.badge(labelled(word), color=badge(word).colour)
    steps = info.get("steps")
    attempt = info.get("attempt") or 1
    st.caption(
        f"{'steps not known' if steps is None else f'{steps:,} steps'} · every {info.get('every', '?')} measured · "
        f"{f'attempt {attempt} · ' if attempt > 1 else ''}"
        f"started {ago(info.get('started_s'))} · last sign of life {ago(info.get('heartbeat_s'))}"
    )


def _until_judged(judged: Verdict, run: str, events: pd.DataFrame) -> None:
    """What the run itself recorded about its health, for as long as there is no full report."""
    show = {"green": st.success, "orange": st.warning, "red": st.error}.get(
        badge(judged.status).colour, st.info
    )
    alerts = events[events["kind"] == "alert"]
    said = (
        "no verdict was recorded beside the run"
        if judged.status == "no-data"
        else f"{judged.status.replace('-', ' ')}, say the detectors that ran beside it"
    )
    raised = f"{len(alerts):,} alert{'' if len(alerts) == 1 else 's'}"
    show(f"**{plain(f'{said[:1].upper()}{said[1:]}; {raised}')}**")
    for mark in marks_of(alerts.iloc[-_ALERTS_SHOWN:])[::-1]:
        st.caption(plain(f"step {mark.step:,}: {mark.severity}: {mark.text}"))
    if judged.problem:
        st.warning(plain(f"The run could not be judged: {judged.problem}"))
    elif judged.under_way:
        st.caption("Judging all of the run beside this page; its findings appear here.")
    elif st.button("Judge all of the run", key="judge", help="replays every measured step: a minute or more"):
        st.session_state[_ASKED] = run
        st.rerun(scope="app")


def _judgement(report: Report, run: str) -> None:
    show = {"green": st.success, "orange": st.warning, "red": st.error}.get(
        badge(report.status).colour, st.info
    )
    show(f"**{plain(verdict(report))}**")
    if report.forecast:
        st.warning(plain(forecast(report.forecast)))
    for finding in report.findings[:_FINDINGS_SHOWN]:
        _finding(finding, run)
    if rest := report.findings[_FINDINGS_SHOWN:]:
        with st.expander(f"{len(rest)} more finding{'s' if len(rest) > 1 else ''}", key="more-findings"):
            for finding in rest:
                _finding(finding, run)
    for sentence in report.missing:
        st.caption(f"Not judged: {plain(sentence)}")


def _finding(finding: Finding, run: str) -> None:
    with st.container(border=True, gap=None):
        st.markdown(f"**{plain(headline(finding))}** · {finding.severity}")
        if finding.evidence:
            st.markdown(f"Evidence: {plain(evidence(finding.evidence))}")
        if finding.advice:
            typed = finding.advice.replace(_ANY_RUN, f"{_ANY_RUN.removesuffix('RUN')}{shlex.quote(run)}")
            st.markdown(f"Advice: {prose(typed)}")
