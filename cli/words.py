"""A report in words: the verdict first, then each finding with its numbers and what to do."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from diagnostics.detect.finding import Finding
from diagnostics.report import Report

from .phrases import commands_in, counted, evidence_words, forecast_ground, forecast_words, place, with_path
from .phrases import number as number  # noqa: PLC0414 - the other verbs' words for numbers are found here
from .state import state_lines

STATUS_STYLES = {
    "healthy": "green",
    "at-risk": "yellow",
    "collapsed": "red",
    "diverged": "bold red",
    "no-data": "dim",
}
SEVERITY_STYLES = {"critical": "red", "warning": "yellow", "info": "cyan"}
# Of what is over, the newest few are named and the rest counted: a long run clears dozens.
_CLEARED = 5


def print_report(
    console: Console,
    report: Report,
    run_dir: str | os.PathLike[str],
    *,
    name: str | None = None,
    info: Mapping[str, Any] | None = None,
) -> None:
    """Prints one run's report.

    Args:
        console: where to.
        report: the verdict.
        run_dir: the run's path or URI, for the commands to type.
        name: what to call the run; None: its own name.
        info: the run's manifest, to say how it stands; None: that is left out.
    """
    console.print(Text(verdict(report, name), style=STATUS_STYLES[report.status]), soft_wrap=True)
    for finding in (*alarming(report), *worth_knowing(report)):
        _print_finding(console, finding, run_dir)
    for line in _cleared_lines(report):
        console.print(Text(f"  {line}", style="dim"), soft_wrap=True)
    if report.forecast is not None:
        told = [forecast_words(report.forecast, report.step), forecast_ground(report.forecast)]
        console.print(f"  forecast: {'; '.join(filter(None, told))}", soft_wrap=True)
    for sentence in report.missing:
        console.print(f"  not judged: {sentence}", soft_wrap=True)
    for sentence in () if info is None else state_lines(info):
        console.print(f"  state: {sentence}", soft_wrap=True)
    advised = any(
        " control " in command for finding in alarming(report) for command in commands_in(finding.advice)
    )
    if info is not None and advised and info.get("state") in ("finished", "crashed"):
        console.print(f"  state: {_OVER}", soft_wrap=True)


_OVER = "no process listens to commands any more: what `diagnostics control` would do is for the next attempt"


def verdict(report: Report, name: str | None = None) -> str:
    """One line: the run, its status, and the worst thing behind it."""
    name = report.run if name is None else name
    if report.status == "no-data":
        return f"{name}: no data to judge"
    alarms = alarming(report)
    head = f"{name}: {report.status.replace('-', ' ')} at step {report.step}"
    if report.status == "healthy" and not alarms:
        cleared = sum(not finding.active for finding in report.findings)
        return head + (f", after {counted(cleared, 'finding')} that cleared again" if cleared else "")
    cause = f": {alarms[0].kind} {place(alarms[0])}, since step {alarms[0].first_step}" if alarms else ""
    more = f", and {counted(len(alarms) - 1, 'more finding')}" if len(alarms) > 1 else ""
    return head + cause + more


def alarming(report: Report) -> list[Finding]:
    """What is wrong at the step that was judged, the worst first."""
    return [finding for finding in report.findings if finding.active and finding.severity != "info"]


def worth_knowing(report: Report) -> list[Finding]:
    """What holds at the step that was judged and is no alarm."""
    return [finding for finding in report.findings if finding.active and finding.severity == "info"]


def _print_finding(console: Console, finding: Finding, run_dir: str | os.PathLike[str]) -> None:
    when = f"since step {finding.first_step}"
    if finding.raised_step is not None and finding.raised_step != finding.first_step:
        when += f" (alarm at step {finding.raised_step})"
    weight = "worth knowing" if finding.severity == "info" else finding.severity
    line = Text(f"  {weight}: {finding.kind} {place(finding)}, {when}")
    line.stylize(SEVERITY_STYLES.get(finding.severity, ""))
    console.print(line, soft_wrap=True)
    if finding.message:
        _print_indented(console, finding.message)
    if finding.evidence:
        _print_indented(console, f"evidence: {'; '.join(evidence_words(finding.evidence))}")
    if finding.advice:
        # Never wrapped by us: a line break inside a command would be pasted with it.
        console.print(f"    do: {with_path(finding.advice, run_dir)}", soft_wrap=True)


def _print_indented(console: Console, text: str) -> None:
    """Wrapped below its own beginning on a screen; one line in a pipe, where the next program wants it whole."""
    if console.is_terminal:
        console.print(Padding(Text(text), (0, 0, 0, 4)))
    else:
        console.print(f"    {text}", soft_wrap=True)


def _cleared_lines(report: Report) -> Iterator[str]:
    over = [finding for finding in report.findings if not finding.active]
    over.sort(key=lambda finding: (finding.last_step or 0, finding.first_step), reverse=True)
    for finding in over[:_CLEARED]:
        yield (
            f"{finding.severity}: {finding.kind} {place(finding)}, "
            f"from step {finding.first_step} to {finding.last_step}, recovered"
        )
    rest = Counter(finding.kind for finding in over[_CLEARED:])
    if rest:
        kinds = ", ".join(f"{kind} ({many})" for kind, many in rest.most_common())
        yield f"and {counted(rest.total(), 'earlier finding')}, recovered: {kinds}"
