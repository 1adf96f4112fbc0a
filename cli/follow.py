"""A run being followed: what of it was read, reading only what is new."""

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from diagnostics.store.read import Run

from .progress import DRAWN, Progress, Series, by_step

_ALERTS = 50
# A watcher that joins a run of a million steps draws its last part, and keeps no more of one it stays with.
_STEPS_BACK = 2000
_RATE_STEPS = 50
_COLUMNS: dict[str, list[str] | None] = {
    table: ["step", *(drawn.column for drawn in DRAWN if drawn.table == table)]
    for table in ("steps", "attention", "spectra", "updates")
} | {"events": None}
_COLUMNS["steps"] = [*(_COLUMNS["steps"] or ()), "time_s"]


@dataclass(frozen=True)
class Alert:
    """An alert as it was raised.

    Attributes:
        step: the step it was raised at.
        severity: `info`, `warning` or `critical`.
        what: the pathology and where it is.
        message: what it means, in one sentence.
        advice: what to do; the run is called RUN in it.
    """

    step: int
    severity: str
    what: str
    message: str
    advice: str

    @property
    def line(self) -> str:
        words = f"{self.what}: {self.message}" if self.what else self.message
        return f"step {self.step}: {self.severity}: {words}"

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> "Alert":
        """Reads a row of `events`."""
        where = "" if event["layer"] is None else f"in {event['layer']}"
        where += "" if event["head"] is None else f", head {event['head']}"
        try:
            data = json.loads(event["data"] or "{}")
        except ValueError:
            data = {}
        data = data if isinstance(data, dict) else {}
        what = " ".join(str(part) for part in (data.get("kind"), where) if part)
        advice = data.get("advice")
        return cls(
            step=event["step"],
            severity=str(event["severity"]),
            what=what,
            message=str(event["message"]),
            advice=advice if isinstance(advice, str) else "",
        )


@dataclass(frozen=True)
class News:
    """What came since the last look.

    Attributes:
        resumed: a sentence on a new attempt, None where there is none.
        alerts: those raised meanwhile.
    """

    resumed: str | None
    alerts: tuple[Alert, ...]


class Followed:
    """A run being followed: what has been read of it, and its newest alerts.

    Args:
        run: the run.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.progress = Progress()
        self.alerts: deque[Alert] = deque(maxlen=_ALERTS)
        self.info: Mapping[str, Any] = run.info
        self.attempt = self._begun_attempt()
        self._start = max(0, int(self.info.get("steps") or 0) - _STEPS_BACK)
        self._times: Series = {}
        self._cursors = {table: run.follow(table, columns) for table, columns in _COLUMNS.items()}

    @property
    def state(self) -> str:
        return str(self.info["state"])

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "crashed")

    @property
    def steps_per_s(self) -> float | None:
        """Over the last fifty steps; None where their times do not tell."""
        told = [(step, time_s) for step, time_s in self._times.items() if time_s is not None]
        if not told:
            return None
        (first, first_s), (last, last_s) = told[0], told[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s and last > first else None

    def refresh(self) -> News:
        """Reads what is new."""
        # The state first: what a run wrote before it said `finished` is then read below.
        self.info = self.run.info
        resumed = None
        if (attempt := self._begun_attempt()) != self.attempt:
            self.attempt = attempt
            resumed = _resume_line(self.info)
        alerts: list[Alert] = []
        for table, cursor in self._cursors.items():
            news = cursor.read()
            rows = news.rows.filter(pc.field("step") >= self._start)
            if table == "events":
                if news.replaces_from is not None:
                    standing = [alert for alert in self.alerts if alert.step < news.replaces_from]
                    self.alerts = deque(standing, maxlen=_ALERTS)
                alerts = [Alert.of(event) for event in rows.to_pylist() if event["kind"] == "alert"]
                continue
            if news.replaces_from is not None:
                self.progress.forget_from(table, news.replaces_from)
            self.progress.take_in(table, rows)
            if table == "steps":
                self._keep_times(by_step(rows, "time_s", "max"), news.replaces_from)
        self.alerts.extend(alerts)
        self._let_go()
        return News(resumed, tuple(alerts))

    def _keep_times(self, new: Series, replaces_from: int | None) -> None:
        if replaces_from is not None:
            self._times.clear()
        newest = [*self._times.items(), *new.items()][-_RATE_STEPS:]
        self._times = dict(newest)

    def _let_go(self) -> None:
        """In steps of a whole window: dropping one step a time would copy the rest each time."""
        step = self.progress.step
        if step is not None and len(self.progress.loss) > 2 * _STEPS_BACK:
            self.progress.forget_before(step - _STEPS_BACK)

    def _begun_attempt(self) -> int:
        """The newest attempt that has closed a step: one without replaces nothing yet."""
        attempts = self.info.get("attempts") or []
        begun = [one["attempt"] for one in attempts if isinstance(one.get("first_step"), int)]
        return max(begun, default=1)


def _resume_line(info: Mapping[str, Any]) -> str:
    *before, now = info["attempts"]
    was = f" (attempt {before[-1]['attempt']}: {before[-1].get('state')})" if before else ""
    return f"attempt {now['attempt']} resumed at step {now['first_step']}{was}"
