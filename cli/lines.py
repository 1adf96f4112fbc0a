"""`watch` in a log or a pipe, where there is no screen to redraw: a line whenever there is news."""

import sys

from rich.console import Console

from .follow import Followed, News
from .phrases import forecast_words, number
from .progress import last

_TOLD = ("loss", "entropy", "sec", "logit")


class Lines:
    """Tells what came, a line each.

    Args:
        console: where to.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._step: int | None = None
        self._foreseen = False

    def show(self, followed: Followed, news: News) -> None:
        """A resume first, then the step, then the alerts that it brought, then a forecast where there is one now."""
        if news.resumed is not None:
            self._say(news.resumed)
        progress = followed.progress
        if progress.step != self._step:
            self._step = progress.step
            told = [(drawn, series) for drawn, series in progress.series() if drawn.name in _TOLD]
            cells = ", ".join(f"{drawn.label} {number(last(series))}" for drawn, series in told)
            self._say(f"step {self._step}: {cells}")
        for alert in news.alerts:
            self._say(f"alert: {alert.line}")
        forecast = followed.info.get("forecast")
        # It changes with every measured step; news is that there is one.
        if isinstance(forecast, dict) and not self._foreseen:
            self._say(f"forecast: {forecast_words(forecast, progress.step)}")
        self._foreseen = isinstance(forecast, dict)
        sys.stdout.flush()

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)
