"""`watch` in a terminal: one screen, drawn anew as the run goes on."""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from .follow import Alert, Followed, News
from .phrases import commands_in, forecast_ground, forecast_words, number, time_words, with_path
from .progress import last
from .sparkline import sparkline
from .words import SEVERITY_STYLES, STATUS_STYLES
from .worst_head import WorstHead, worst_head

_LABEL, _VALUE, _GAP = 21, 9, 2
_POINTS = 100
# The lines of a screen that are no alerts; what is left of its height is theirs.
_OTHER_LINES = 17
_ALERTS = 8
_STATE_STYLES = {"running": "green", "stalled": "yellow", "crashed": "red"}


class Screen:
    """What is shown of a followed run.

    Args:
        run_dir: its path or URI, for the commands to type.
        live: where it is drawn.
    """

    def __init__(self, run_dir: str | os.PathLike[str], live: Live) -> None:
        self._run_dir = run_dir
        self._live = live
        self._worst: WorstHead | None = None
        self._looked_at: int | None = None
        self.drawn: RenderableType = ""

    def show(self, followed: Followed, news: News) -> None:
        """Draws the run as it stands."""
        del news  # a screen shows all there is
        measured = next(reversed(followed.progress.entropy), None)
        if measured is not None and measured != self._looked_at:
            self._looked_at = measured
            self._worst = worst_head(followed.run, measured) or self._worst
        console = self._live.console
        self.drawn = drawing(followed, self._worst, self._run_dir, console.width, console.height)
        self._live.update(self.drawn, refresh=True)


@contextmanager
def screen(console: Console, run_dir: str | os.PathLike[str]) -> Iterator[Screen]:
    """A screen of its own; what stood there comes back at the end, with the last picture below it."""
    with Live(console=console, auto_refresh=False, screen=True) as live:
        shown = Screen(run_dir, live)
        yield shown
    console.print(shown.drawn)


def drawing(
    followed: Followed,
    worst: WorstHead | None,
    run_dir: str | os.PathLike[str],
    width: int,
    height: int,
) -> Group:
    """One picture: how the run stands, its course, its worst head, alerts, forecast, and what to type.

    Args:
        followed: the run.
        worst: its worst head, None where none is known.
        run_dir: its path or URI.
        width: of the terminal, columns.
        height: of the terminal, lines.
    """
    info = followed.info
    parts: list[RenderableType] = [_title(followed), Text(), _course(followed, width)]
    if worst is not None:
        parts.append(_labelled("worst head", Text(worst.words)))
    parts += [Text(), _labelled("status", _status(info))]
    if "forecast" in info:
        parts.append(_labelled("forecast", Text(_forecast(followed))))
    parts.append(_alerts(list(followed.alerts), min(_ALERTS, max(1, height - _OTHER_LINES))))
    parts += [Text(), _labelled("to type", Text(_to_type(followed, run_dir), style="bold", overflow="fold"))]
    return Group(*parts)


def _title(followed: Followed) -> Text:
    step, info = followed.progress.step, followed.info
    title = Text(followed.run.name, style="bold")
    title.append(f": {followed.state}", style=f"bold {_STATE_STYLES.get(followed.state, '')}".strip())
    title.append(", no step yet" if step is None else f", step {step}")
    if followed.attempt > 1:
        title.append(f", attempt {followed.attempt}")
    if (rate := followed.steps_per_s) is not None:
        title.append(f", {rate:.3g} steps/s")
    last_s = info.get("last_step_s")
    if not followed.ended and step is not None and isinstance(last_s, (int, float)):
        title.append(f", {time_words(time.time() - last_s)} ago")
    return title


def _course(followed: Followed, width: int) -> Table:
    points = max(8, min(_POINTS, width - _LABEL - _VALUE - 2 * _GAP))
    table = Table.grid(padding=(0, _GAP, 0, 0))
    table.add_column(no_wrap=True, width=_LABEL)
    table.add_column(justify="right", no_wrap=True, width=_VALUE)
    table.add_column(no_wrap=True)
    first, newest = next(iter(followed.progress.loss), None), followed.progress.step
    steps = None if first is None or newest is None else (first, newest)
    for drawn, series in followed.progress.series():
        value = last(series)
        shown = "-" if value is None else number(value)
        table.add_row(drawn.label, shown, sparkline(series, points, drawn.over, steps))
    if steps is not None:
        table.add_row("", "", Text(f"steps {first} to {newest}", style="dim"))
    return table


def _labelled(label: str, *words: RenderableType) -> Table:
    table = Table.grid(padding=(0, _GAP, 0, 0))
    table.add_column(no_wrap=True, width=len("worst head"))
    table.add_column()
    table.add_row(Text(label, style="dim"), Group(*words))
    return table


def _status(info: Mapping[str, Any]) -> Text:
    status = info.get("status")
    if status not in STATUS_STYLES:
        return Text("not judged: this run is recorded without detectors", style="dim")
    if status == "no-data":
        return Text("no data to judge yet", style="dim")
    return Text(str(status).replace("-", " "), style=STATUS_STYLES[status])


def _forecast(followed: Followed) -> str:
    forecast = followed.info.get("forecast")
    if not isinstance(forecast, Mapping):
        return "none: nothing is heading for a collapse"
    measured = next(reversed(followed.progress.entropy), followed.progress.step)
    words = forecast_words(forecast, measured)
    left, rate = forecast.get("steps_to_collapse"), followed.steps_per_s
    if not followed.ended and rate and isinstance(left, (int, float)):
        words += f", {time_words(left / rate)} from now"
    return "; ".join(filter(None, (words, forecast_ground(forecast))))


def _alerts(alerts: list[Alert], room: int) -> Table:
    """A line each, the newest last, and what that one means."""
    if not alerts:
        return _labelled("alerts", Text("none so far"))
    shown = alerts[-room:]
    table = Table.grid(padding=(0, _GAP, 0, 0))
    steps = [f"step {alert.step}" for alert in shown]
    table.add_column(justify="right", no_wrap=True, min_width=max(map(len, steps)))
    table.add_column(no_wrap=True, min_width=len("critical"))
    table.add_column(no_wrap=True, overflow="ellipsis")
    for step, alert in zip(steps, shown, strict=True):
        style = SEVERITY_STYLES.get(alert.severity, "")
        table.add_row(step, Text(alert.severity, style=style), alert.what or alert.message)
    means = [Text(shown[-1].message, style="italic")] if shown[-1].what else []
    return _labelled("alerts", table, *means)


def _to_type(followed: Followed, run_dir: str | os.PathLike[str]) -> str:
    """The command of the newest alert that has one while the run can obey it; a verdict otherwise."""
    if not followed.ended and followed.info.get("status") != "healthy":
        for alert in reversed(followed.alerts):
            commands = commands_in(with_path(alert.advice, run_dir))
            if commands:
                return commands[0]
    return commands_in(with_path("`diagnostics report RUN`", run_dir))[0]
