"""The detectors beside a live run: fed with the rows as they are written, so that a replay finds what they found."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diagnostics.detect.block import SCALARS
from diagnostics.detect.finding import Finding
from diagnostics.detect.live import FrameBuilder
from diagnostics.detect.monitor import Monitor

Row = Mapping[str, Any]
_OF_A_STEP = ("step", "loss", "measured", *SCALARS)


class Detection:
    """Keeps the rows of steps until the measured one that closes their frame, and judges frame by frame.

    Args:
        on: whether to judge at all.
    """

    def __init__(self, *, on: bool) -> None:
        self._monitor = Monitor() if on else None
        self._frames = FrameBuilder()
        self._rows: deque[Row] = deque()
        self._before_last: dict[str, Any] | None = None

    @property
    def on(self) -> bool:
        return self._monitor is not None

    @property
    def waiting(self) -> bool:
        """Whether there are steps in no closed frame."""
        return bool(self._rows) or self._frames.open

    @property
    def status(self) -> str:
        """The run's status so far."""
        assert self._monitor is not None
        return self._monitor.status()

    @property
    def forecast(self) -> dict[str, Any] | None:
        """The forecast as of the last frame."""
        assert self._monitor is not None
        return self._monitor.forecast

    def see_steps(self, rows: Sequence[Row]) -> None:
        """Takes rows of the table `steps`, in their order."""
        if self.on:
            self._rows.extend(rows)
            self._before_last = None

    def see_sites(self, sites: Iterable[Mapping[str, Any]]) -> None:
        """Takes what is known of the attention sites by now."""
        if self._monitor is not None:
            self._monitor.see_sites(sites)

    def close_frame(self, step: int, tables: Mapping[str, Sequence[Row]]) -> list[Finding]:
        """Closes the frame that ends with a measured step, or with the run; returns what was raised at it.

        Args:
            step: its last step.
            tables: rows of `attention`, `spectra` and `updates`, as far as they were measured.
        """
        assert self._monitor is not None
        raised = self._frame_steps(step)
        attention, spectra, updates = (tables.get(name, ()) for name in ("attention", "spectra", "updates"))
        frame = self._frames.close(step, attention, spectra, updates)
        return [*raised, *self._monitor.feed(frame)]

    def close_last(self, step: int) -> list[Finding]:
        """Closes the frame of the steps after the last measured one, because the run ends here.

        A run that is resumed goes on with that frame, as a reader of its tables does: what is saved from now on is
        the state before.
        """
        assert self._monitor is not None
        state = self.state_dict(step)
        raised = self._frame_steps(step)
        raised += self._monitor.feed(self._frames.close(step, measured=False))
        self._before_last = state
        return raised

    def switch_off(self) -> None:
        self._monitor = None
        self._rows.clear()

    def state_dict(self, up_to: int) -> dict[str, Any]:
        """Windows of the detectors and the frame that is open at step `up_to`."""
        if self._before_last is not None:
            return self._before_last
        rows = [{name: row.get(name) for name in _OF_A_STEP} for row in self._rows if row["step"] <= up_to]
        monitor = None if self._monitor is None else self._monitor.state_dict()
        return {"monitor": monitor, "frames": self._frames.state_dict(), "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Puts the detectors where they were when the state was taken; without a state, at the beginning."""
        on = self.on
        self._rows.clear()
        self._before_last = None
        self._frames = FrameBuilder()
        self._monitor = Monitor() if on else None
        if state is not None:
            if self._monitor is not None and state["monitor"] is not None:
                self._monitor.load_state_dict(state["monitor"])
            self._frames.load_state_dict(state["frames"])
            self._rows.extend(state.get("rows", ()))

    def _frame_steps(self, up_to: int) -> list[Finding]:
        """Takes the rows of steps into the open frame.

        A measured step whose measurements were lost closes a frame without any, as it does for a reader.
        """
        raised = []
        while self._rows and self._rows[0]["step"] <= up_to:
            row = self._rows.popleft()
            self._frames.add(row)
            if row["measured"] and row["step"] < up_to and self._monitor is not None:
                raised += self._monitor.feed(self._frames.close(row["step"]))
        return raised
