"""`diagnostics watch RUN`: follows a live run in the terminal."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from diagnostics.report import assess
from diagnostics.store.read import Run, open_run

from .output import answers
from .progress import Progress, Series, last
from .words import number, print_report

_PERIOD_S = 1.0
_ENDED = ("finished", "crashed")
_BARS = "▁▂▃▄▅▆▇█"
_POINTS = 40
_ALERTS = 5
# A watcher that joins a run of a million steps draws its last part, and need not read the rest.
_STEPS_BACK = 2000


def watch(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """Follow a live run in the terminal until it ends or Ctrl-C."""
    followed = Followed(open_run(run))
    console = answers()
    try:
        _follow(followed, console)
    except KeyboardInterrupt:
        return
    print_report(console, assess(run), run)


class Followed:
    """A run being followed: what has been read of it, and its newest alerts.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.progress = Progress()
        self.alerts: deque[str] = deque(maxlen=_ALERTS)
        self.info: Mapping[str, Any] = run.info
        self._start = max(0, int(self.info.get("steps") or 0) - _STEPS_BACK)
        self._next_event = self._start
        self._seen: set[tuple[Any, ...]] = set()

    @property
    def state(self) -> str:
        return str(self.info["state"])

    def refresh(self) -> list[str]:
        """Reads what is new and returns the new alerts, oldest first, a line each."""
        # The state first: what a run wrote before it said `finished` is then read below.
        self.info = self.run.info
        self.progress.read(self.run, self._start)
        alerts = []
        # Events of a step may reach the disk in two files: the newest step is read again, and known rows left out.
        for event in self.run.table("events", None, self._next_event).to_pylist():
            self._next_event = event["step"]
            key = (
                event["step"],
                event["time_s"],
                event["kind"],
                event["layer"],
                event["head"],
                event["message"],
            )
            if key not in self._seen and event["kind"] == "alert":
                alerts.append(_alert_line(event))
            self._seen.add(key)
        self.alerts.extend(alerts)
        return alerts


def _follow(followed: Followed, console: Console) -> None:
    if not console.is_terminal:
        _follow_in_lines(followed, console)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            followed.refresh()
            live.update(_screen(followed), refresh=True)
            if followed.state in _ENDED:
                return
            time.sleep(_PERIOD_S)


def _follow_in_lines(followed: Followed, console: Console) -> None:
    """In a log or a pipe there is no screen to redraw: a line whenever there is news."""
    shown = None
    while True:
        alerts = followed.refresh()
        progress = followed.progress
        if progress.step != shown:
            shown = progress.step
            cells = ", ".join(f"{name} {number(last(series))}" for name, series in _rows(progress))
            console.print(f"step {shown}: {cells}", soft_wrap=True)
        for line in alerts:
            console.print(f"alert: {line}", soft_wrap=True)
        sys.stdout.flush()
        if followed.state in _ENDED:
            return
        time.sleep(_PERIOD_S)


def _rows(progress: Progress) -> tuple[tuple[str, Series], ...]:
    return (
        ("loss", progress.loss),
        ("lowest entropy (nats)", progress.entropy),
        ("mean SEC", progress.sec),
        ("largest logit", progress.logit),
    )


def _screen(followed: Followed) -> Group:
    progress = followed.progress
    step = "no step yet" if progress.step is None else f"step {progress.step}"
    parts: list[Text | Table] = [Text(f"{followed.run.name}: {followed.state}, {step}", style="bold")]
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right", min_width=12)
    table.add_column(no_wrap=True)
    for name, series in _rows(progress):
        table.add_row(name, number(last(series)), sparkline(series))
    parts.append(table)
    parts += [Text(line, style="yellow") for line in followed.alerts]
    return Group(*parts)


def sparkline(series: Series, points: int = _POINTS) -> str:
    """The newest values as bars between their own smallest and largest; a gap for null, `!` where not finite."""
    values = list(series.values())[-points:]
    finite = [value for value in values if value is not None and math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    span = high - low
    return "".join(_bar(value, low, span) for value in values)


def _bar(value: float | None, low: float, span: float) -> str:
    if value is None:
        return " "
    if not math.isfinite(value):
        return "!"
    return _BARS[min(len(_BARS) - 1, int((value - low) / span * len(_BARS)))] if span > 0.0 else _BARS[0]


def _alert_line(event: Mapping[str, Any]) -> str:
    where = "" if event["layer"] is None else f" in {event['layer']}"
    head = "" if event["head"] is None else f", head {event['head']}"
    try:
        data = json.loads(event["data"] or "{}")
    except ValueError:
        data = {}
    kind = data.get("kind") if isinstance(data, dict) else None
    what = f"{kind}{where}{head}: {event['message']}" if kind else f"{event['message']}{where}{head}"
    return f"step {event['step']}: {event['severity']}: {what}"
