"""A report in words: the verdict first, then each finding with its numbers and what to do."""

import math
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from diagnostics.detect.finding import Finding
from diagnostics.report import Report

STATUS_STYLES = {
    "healthy": "green",
    "at-risk": "yellow",
    "collapsed": "red",
    "diverged": "bold red",
    "no-data": "dim",
}
_SEVERITY_STYLES = {"critical": "red", "warning": "yellow", "info": ""}


def print_report(console: Console, report: Report, run_dir: str | os.PathLike[str]) -> None:
    """Prints one run's report.

    Args:
        console: where to.
        report: the verdict.
        run_dir: the run's path or URI, for the commands to type.
    """
    console.print(Text(verdict(report), style=STATUS_STYLES[report.status]), soft_wrap=True)
    for finding in report.findings:
        for line in _finding_lines(finding, run_dir):
            console.print(line, soft_wrap=True)
    if report.forecast is not None:
        console.print(f"  forecast: {_forecast(report.forecast)}", soft_wrap=True)
    for sentence in report.missing:
        console.print(f"  not judged: {sentence}", soft_wrap=True)


def verdict(report: Report) -> str:
    """One line: the run, its status, and the worst thing behind it."""
    if report.status == "no-data":
        return f"{report.run}: no data to judge"
    active = [finding for finding in report.findings if finding.active]
    at = f"at step {report.step}"
    if report.status == "healthy":
        cleared = len(report.findings) - len(active)
        after = f", after {counted(cleared, 'finding')} that cleared again" if cleared else ""
        return f"{report.run}: healthy {at}{after}"
    status = report.status.replace("-", " ")
    cause = f": {active[0].kind} {place(active[0])}, since step {active[0].first_step}" if active else ""
    more = f", and {counted(len(active) - 1, 'more finding')}" if len(active) > 1 else ""
    return f"{report.run}: {status} {at}{cause}{more}"


def place(finding: Finding) -> str:
    """Where it is: layer and head, or the whole run."""
    if finding.layer is None:
        return "of the whole run"
    return f"in {finding.layer}" + ("" if finding.head is None else f", head {finding.head}")


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _finding_lines(finding: Finding, run_dir: str | os.PathLike[str]) -> Iterator[Text]:
    when = f"since step {finding.first_step}"
    if finding.raised_step is not None and finding.raised_step != finding.first_step:
        when += f" (alarm at step {finding.raised_step})"
    style = _SEVERITY_STYLES.get(finding.severity, "")
    if not finding.active:
        when = f"from step {finding.first_step} to {finding.last_step}, recovered"
        style = "dim"
    yield Text(f"  {finding.severity}: {finding.kind} {place(finding)}, {when}", style=style)
    if finding.message:
        yield Text(f"    {finding.message}")
    if finding.evidence:
        yield Text(f"    evidence: {'; '.join(_evidence(finding.evidence))}")
    if finding.advice and finding.active:
        # Findings know no path, their advice says RUN; here the path is known and the line can be pasted.
        advice = finding.advice.replace("control RUN ", f"control {shlex.quote(os.fspath(run_dir))} ")
        yield Text(f"    do: {advice}")


def _evidence(evidence: Mapping[str, Any]) -> Iterator[str]:
    """Each number with the healthy band that it left, where the detector gives one as `<name>_healthy`."""
    for name, value in evidence.items():
        if name.endswith("_healthy") and name.removesuffix("_healthy") in evidence:
            continue
        band = evidence.get(f"{name}_healthy")
        yield f"{name} {number(value)}" + ("" if band is None else f" (healthy: {number(band)})")


def _forecast(forecast: Mapping[str, float]) -> str:
    return (
        f"collapse in about {number(forecast['steps_to_collapse'])} steps "
        f"({number(forecast['low'])} to {number(forecast['high'])}), confidence {number(forecast['confidence'])}"
    )


def number(value: Any) -> str:  # noqa: ANN401 - evidence holds numbers, names, bands and lists of them
    """A value as people write it: four significant digits, `not observed` for null, a band as `low to high`."""
    if value is None:
        return "not observed"
    if isinstance(value, (Mapping, list, tuple)):
        return _several(value)
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _several(values: Mapping[str, Any] | Sequence[Any]) -> str:
    if not values:
        return "none"
    if isinstance(values, Mapping):
        return ", ".join(f"{name} {number(entry)}" for name, entry in values.items())
    return (" to " if len(values) == 2 else ", ").join(number(entry) for entry in values)  # noqa: PLR2004 - a band has two ends
