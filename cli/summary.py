"""Many runs at a glance: a table, the worst first, and a line of counts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diagnostics.detect.finding import SEVERITIES, Finding

from .judging import Judged
from .phrases import counted, forecast_words, place
from .state import resumed_from
from .words import STATUS_STYLES, alarming, worth_knowing

_ORDER = ("diverged", "collapsed", "at-risk", "no-data", "healthy")
# On a screen the healthy runs of a large sweep would push the others out of sight.
_HEALTHY_SHOWN = 20


@dataclass(frozen=True)
class Entry:
    """A run of several.

    Attributes:
        name: its path below what was asked for.
        judged: its verdict.
    """

    name: str
    judged: Judged

    @property
    def status(self) -> str:
        return self.judged.report.status


def worst_first(entries: Sequence[Entry]) -> list[Entry]:
    """The worst status first, in it the severest finding, then the nearest forecast, then by name."""

    def rank(entry: Entry) -> tuple[int, int, float, str]:
        alarms = alarming(entry.judged.report)
        severity = max((SEVERITIES.index(alarm.severity) for alarm in alarms), default=-1)
        left = (entry.judged.report.forecast or {}).get("steps_to_collapse")
        return _ORDER.index(entry.status), -severity, float("inf") if left is None else left, entry.name

    return sorted(entries, key=rank)


def print_summary(console: Console, entries: Sequence[Entry]) -> None:
    """A table on a screen, in a pipe a line for each run with its columns aligned.

    Args:
        console: where to.
        entries: the runs, the worst first.
    """
    if not console.is_terminal:
        rows = [(_short_verdict(entry), _state(entry), _worst(entry), _forecast(entry)) for entry in entries]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            console.print("  ".join(cells).rstrip(), soft_wrap=True)
        return
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    for heading in ("state", "status"):
        table.add_column(heading)
    table.add_column("step", justify="right")
    for heading in ("worst finding", "forecast"):
        table.add_column(heading, overflow="fold")
    healthy = [entry for entry in entries if entry.status == "healthy"]
    hidden = healthy[_HEALTHY_SHOWN:]
    for entry in entries[: len(entries) - len(hidden)]:
        step = entry.judged.report.step
        table.add_row(
            entry.name,
            _state(entry),
            Text(entry.status, style=STATUS_STYLES[entry.status]),
            "" if step is None else str(step),
            _worst(entry),
            _forecast(entry),
        )
    console.print(table)
    if hidden:
        console.print(f" and {counted(len(hidden), 'more healthy run')}")


def counts(entries: Sequence[Entry]) -> str:
    """`12 runs: 1 diverged, 2 at risk, 9 healthy; 3 still running`."""
    by_status = Counter(entry.status for entry in entries)
    words = {"at-risk": "at risk", "no-data": "without data"}
    told = ", ".join(f"{by_status[one]:,} {words.get(one, one)}" for one in _ORDER if by_status[one])
    by_state = Counter(entry.judged.info.get("state") for entry in entries)
    states = (("running", "still running"), ("stalled", "stalled"), ("crashed", "crashed"))
    live = ", ".join(f"{by_state[state]:,} {name}" for state, name in states if by_state[state])
    return f"{counted(len(entries), 'run')}: {told}" + (f"; {live}" if live else "")


def _short_verdict(entry: Entry) -> str:
    if entry.status == "no-data":
        return f"{entry.name}: no data to judge"
    return f"{entry.name}: {entry.status.replace('-', ' ')} at step {entry.judged.report.step}"


def _state(entry: Entry) -> str:
    if not entry.judged.info:
        return "unreadable"
    resumed = resumed_from(entry.judged.info)
    return str(entry.judged.info["state"]) + (f" ({resumed})" if resumed else "")


def _worst(entry: Entry) -> str:
    alarms, known = alarming(entry.judged.report), worth_knowing(entry.judged.report)
    if alarms:
        return f"{_named(alarms[0])}, since step {alarms[0].first_step}"
    return f"worth knowing: {_named(known[0])}" if known else ""


def _named(finding: Finding) -> str:
    return finding.kind if finding.layer is None else f"{finding.kind} {place(finding)}"


def _forecast(entry: Entry) -> str:
    report = entry.judged.report
    return "" if report.forecast is None else forecast_words(report.forecast, report.step)
