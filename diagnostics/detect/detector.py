"""What every detector is: a signal, the edge of its healthy band, and what to say when it is left."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from diagnostics.detect.alarm import Alarm
from diagnostics.detect.bands import PLAIN, QK_NORM, Band
from diagnostics.detect.block import Bools, Values
from diagnostics.detect.finding import Finding, FindingLog
from diagnostics.detect.window import Window

Over = Literal["heads", "parameters", "run"]


class Words(NamedTuple):
    """What a finding says besides where and when.

    Attributes:
        evidence: numbers by name; `<name>_healthy` beside one gives the band it left.
        message: one sentence: what it means, where, with the main number.
        advice: what to do, with the command to type.
    """

    evidence: dict[str, Any]
    message: str
    advice: str


class Judged(NamedTuple):
    """A detector's view of the new frames, (F,) each.

    Attributes:
        score: the worst signal in units of the band's edge; -1 where nothing could be judged.
        worst: column of the worst signal.
        start, stay: whether the alarm's condition holds, and whether an active alarm is still justified.
        known: whether anything could be judged.
    """

    score: Values
    worst: np.ndarray[Any, np.dtype[np.intp]]
    start: Bools
    stay: Bools
    known: Bools


class Detector(ABC):
    """Streaming: takes windows in step order, keeps its findings, looks at nothing else.

    One number is tuned, the band's edge; conditions that are not tuned go into the signal, which is 0 where they
    do not hold. Signals are >= 0, larger is worse, NaN is not judged.

    Attributes:
        kind, severity, status: of its findings.
        over: what the columns of its signal stand for.
        needed, calm: frames in a row before an alarm, and without its condition before it is cleared.
        refractory: steps after that in which it is not raised again.
        stay_share: share of the edge above which an active alarm stays (hysteresis).
    """

    kind: ClassVar[str]
    severity: ClassVar[str] = "warning"
    status: ClassVar[str] = "at-risk"
    over: ClassVar[Over] = "heads"
    needed: ClassVar[int] = 2
    calm: ClassVar[int] = 3
    refractory: ClassVar[int] = 100
    stay_share: ClassVar[float] = 0.5

    def __init__(self, band: Band) -> None:
        self.band = band
        self._alarm = Alarm(needed=self.needed, calm=self.calm, refractory=self.refractory)
        self._log = FindingLog()

    @abstractmethod
    def signal(self, window: Window) -> Values:
        """(F, H), (F, P) or (F, 1), as `over` says."""

    @abstractmethod
    def describe(self, window: Window, frame: int, column: int) -> Words:
        """What to say of an alarm raised at a new frame (by its index), for the worst column there."""

    def conditions(self, score: Values) -> tuple[Bools, Bools]:
        """Where an alarm starts, and where an active one stays."""
        return score >= 1.0, score >= self.stay_share

    def edges(self, window: Window) -> Values:
        """The band's edge for every column."""
        if self.over != "heads":
            return np.array([self.band.of(PLAIN)])
        plain, qk_norm = self.band.of(PLAIN), self.band.of(QK_NORM)
        return np.where(window.flag(QK_NORM), qk_norm, plain)

    def judge(self, window: Window) -> Judged:
        """Scores the new frames; changes nothing."""
        raw = self.signal(window)
        if not raw.shape[1]:
            nothing = np.zeros(len(window), dtype=np.bool_)
            return Judged(
                np.full(len(window), -1.0), np.zeros(len(window), dtype=np.intp), nothing, nothing, nothing
            )
        excess = np.where(np.isnan(raw), -1.0, raw / self.edges(window))
        worst = np.argmax(excess, axis=1)
        score = np.take_along_axis(excess, worst[:, None], axis=1)[:, 0]
        return Judged(score, worst, *self.conditions(score), score >= 0.0)

    def feed(self, window: Window) -> list[Finding]:
        """Takes the next frames; returns the findings raised at them."""
        judged = self.judge(window)
        window.scores[self.kind] = judged.score
        raised = []
        for turn in self._alarm.run(window.steps, judged.start, judged.stay, judged.known):
            step = int(window.steps[turn.frame])
            if turn.raised:
                column = int(judged.worst[turn.frame])
                finding = self._finding(window, turn.frame, column, first_step=turn.onset, step=step)
                raised += self._log.add(finding)
            else:
                self._log.end(self.kind, step)
        return raised

    def _finding(self, window: Window, frame: int, column: int, *, first_step: int, step: int) -> Finding:
        words = self.describe(window, frame, column)
        layer, head = window.heads[column] if self.over == "heads" else (None, None)
        if self.over == "parameters":
            layer = window.parameters[column].rpartition(".")[0]
        return Finding(
            self.kind, self.severity, layer, head, first_step, words.evidence, words.advice, words.message,
            status=self.status, raised_step=step,
        )  # fmt: skip

    @property
    def active(self) -> bool:
        return self._alarm.active

    def findings(self) -> list[Finding]:
        """All so far, each as it stands now."""
        return list(self._log)

    def state_dict(self) -> dict[str, Any]:
        return {"alarm": self._alarm.state_dict(), "findings": self._log.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._alarm.load_state_dict(state["alarm"])
        self._log.load_state_dict(state["findings"])
