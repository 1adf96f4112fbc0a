"""The detectors beside a live run: fed with the rows as they are written, so that a replay finds what they found."""

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from diagnostics.detect.finding import Finding
from diagnostics.detect.monitor import Monitor
from diagnostics.detect.replay import FrameBuilder

Row = Mapping[str, Any]


class Detection:
    """Keeps losses until the measured step that closes their frame, and judges frame by frame.

    Args:
        on: whether to judge at all.
    """

    def __init__(self, *, on: bool) -> None:
        self._monitor = Monitor() if on else None
        self._frames = FrameBuilder()
        self._losses: deque[tuple[int, float | None]] = deque()

    @property
    def on(self) -> bool:
        return self._monitor is not None

    @property
    def waiting(self) -> bool:
        """Whether there are losses in no closed frame."""
        return bool(self._losses) or self._frames.open

    @property
    def status(self) -> str:
        """The run's status so far."""
        assert self._monitor is not None
        return self._monitor.status()

    def see_steps(self, rows: Sequence[Row]) -> None:
        """Takes rows of the table `steps`, in their order."""
        if self.on:
            self._losses.extend((row["step"], row["loss"]) for row in rows)

    def close_frame(self, step: int, tables: Mapping[str, Sequence[Row]]) -> list[Finding]:
        """Closes the frame that ends with a measured step, or with the run; returns what was raised at it.

        Args:
            step: its last step.
            tables: rows of `attention`, `spectra` and `updates`, as far as they were measured.
        """
        assert self._monitor is not None
        self._frame_losses(step)
        rows = (tables.get(name, ()) for name in ("attention", "spectra", "updates"))
        return self._monitor.feed(self._frames.close(step, *rows))

    def switch_off(self) -> None:
        self._monitor = None
        self._losses.clear()

    def state_dict(self, up_to: int) -> dict[str, Any]:
        """Windows of the detectors and the frame that is open at step `up_to`."""
        if self._monitor is None:
            return {"monitor": None, "frames": self._frames.state_dict()}
        self._frame_losses(up_to)
        return {"monitor": self._monitor.state_dict(), "frames": self._frames.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Puts the detectors where they were when the state was taken; without a state, at the beginning."""
        on = self.on
        self._losses.clear()
        self._frames = FrameBuilder()
        self._monitor = Monitor() if on else None
        if state is not None:
            if self._monitor is not None and state["monitor"] is not None:
                self._monitor.load_state_dict(state["monitor"])
            self._frames.load_state_dict(state["frames"])

    def _frame_losses(self, up_to: int) -> None:
        while self._losses and self._losses[0][0] <= up_to:
            self._frames.add(*self._losses.popleft())
