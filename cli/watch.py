"""`diagnostics watch RUN`: follows a live run in the terminal."""

import json
import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
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

_COLUMNS: dict[str, list[str] | None] = {
    "steps": ["step", "loss"],
    "attention": ["step", "entropy", "max_logit"],
    "spectra": ["step", "sec_1"],
    "events": None,
}
# Of each table the series of `Progress`: its name, the column, and how the heads of a step are summed up.
_SERIES = {
    "steps": (("loss", "loss", "max"),),
    "attention": (("entropy", "entropy", "min"), ("logit", "max_logit", "max")),
    "spectra": (("sec", "sec_1", "mean"),),
}


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, by its directory or URI.")],
) -> None:
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
        self.attempt = self._begun_attempt()
        self._start = max(0, int(self.info.get("steps") or 0) - _STEPS_BACK)
        self._cursors = {table: run.follow(table, columns) for table, columns in _COLUMNS.items()}

    @property
    def state(self) -> str:
        return str(self.info["state"])

    def refresh(self) -> list[str]:
        """Reads what is new and returns what there is to tell of it, a line each: a resume, then alerts."""
        # The state first: what a run wrote before it said `finished` is then read below.
        self.info = self.run.info
        told = []
        if (attempt := self._begun_attempt()) != self.attempt:
            self.attempt = attempt
            told.append(_resume_line(self.info))
        for table, cursor in self._cursors.items():
            news = cursor.read()
            if news.replaces_from is not None and table != "events":
                _forget(self.progress, table, news.replaces_from)
            rows = news.rows.filter(pc.field("step") >= self._start)
            if table == "events":
                alerts = [_alert_line(event) for event in rows.to_pylist() if event["kind"] == "alert"]
                self.alerts.extend(alerts)
                told += [f"alert: {line}" for line in alerts]
            else:
                _take_in(self.progress, table, rows)
        return told

    def _begun_attempt(self) -> int:
        """The newest attempt that has closed a step: one without replaces nothing yet."""
        attempts = self.info.get("attempts") or []
        begun = [one["attempt"] for one in attempts if isinstance(one.get("first_step"), int)]
        return max(begun, default=1)


def _take_in(progress: Progress, table: str, rows: pa.Table) -> None:
    for name, column, over in _SERIES[table]:
        series: Series = getattr(progress, name)
        # Arrow rather than pandas: it keeps null (not measured) apart from NaN (measured, and not a number).
        by_step = rows.group_by("step", use_threads=False).aggregate([(column, over)])
        values = by_step[f"{column}_{over}"].to_pylist()
        series.update(zip(by_step["step"].to_pylist(), values, strict=True))


def _forget(progress: Progress, table: str, first_step: int) -> None:
    """Drops the steps that a new attempt computes again."""
    for name, _, _ in _SERIES[table]:
        series: Series = getattr(progress, name)
        for step in [step for step in series if step >= first_step]:
            del series[step]


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
        told = followed.refresh()
        progress = followed.progress
        resumes = [line for line in told if not line.startswith("alert")]
        for line in resumes:
            console.print(line, soft_wrap=True)
        if progress.step != shown:
            shown = progress.step
            cells = ", ".join(f"{name} {number(last(series))}" for name, series in _rows(progress))
            console.print(f"step {shown}: {cells}", soft_wrap=True)
        for line in told[len(resumes) :]:
            console.print(line, soft_wrap=True)
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
    again = f", attempt {followed.attempt}" if followed.attempt > 1 else ""
    title = f"{followed.run.name}: {followed.state}, {step}{again}"
    parts: list[Text | Table] = [Text(title, style="bold")]
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


def _resume_line(info: Mapping[str, Any]) -> str:
    *before, now = info["attempts"]
    was = f" (attempt {before[-1]['attempt']}: {before[-1].get('state')})" if before else ""
    return f"attempt {now['attempt']} resumed at step {now['first_step']}{was}"


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
