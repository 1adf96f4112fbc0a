"""From a condition at single frames to an alarm: persistence before, hysteresis and a pause after."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from diagnostics.detect.block import Bools, Ints


class Turn(NamedTuple):
    """An alarm that was raised or cleared, at the frame of that index; `onset`: where its condition began."""

    frame: int
    raised: bool
    onset: int


class Alarm:
    """Raised after a condition held at `needed` frames in a row, cleared after `calm` frames in a row without it.

    Args:
        needed: frames in a row before the alarm is raised; one odd frame is none.
        calm: frames in a row without the condition before it is cleared.
        refractory: steps after it was cleared in which it is not raised again.
    """

    def __init__(self, *, needed: int, calm: int = 3, refractory: int = 0) -> None:
        self._needed = needed
        self._calm = calm
        self._refractory = refractory
        self._held = 0
        self._quiet = 0
        self._began: int | None = None
        self._cleared: int | None = None
        self.onset: int | None = None
        """Step at which the condition that raised the alarm began; None while it is off."""

    @property
    def active(self) -> bool:
        return self.onset is not None

    def run(self, steps: Ints, start: Bools, stay: Bools, known: Bools | None = None) -> Iterator[Turn]:
        """Takes frames in their order and gives what happened.

        Args:
            steps: (F,) the steps of the frames.
            start: (F,) whether the condition for raising holds.
            stay: (F,) whether an active alarm is still justified.
            known: (F,) whether either could be judged (None: everywhere); frames where not change nothing.
        """
        frame = 0
        while frame < len(steps):
            if not self.active and not self._held:
                # Nearly all of a healthy run: nothing holds, and nothing can change before something does.
                ahead = start[frame:] if known is None else start[frame:] & known[frame:]
                skipped = int(np.argmax(ahead)) if ahead.any() else len(steps) - frame
                frame += skipped
                if frame == len(steps):
                    return
            if known is None or known[frame]:
                was = self.onset
                if self.see(int(steps[frame]), start=bool(start[frame]), stay=bool(stay[frame])):
                    yield Turn(frame, raised=True, onset=self.onset or 0)
                elif was is not None and self.onset is None:
                    yield Turn(frame, raised=False, onset=was)
            frame += 1

    def see(self, step: int, *, start: bool, stay: bool | None = None) -> bool:
        """Takes one frame; True where the alarm is raised at it.

        Args:
            step: the frame's step.
            start: whether the condition for raising holds.
            stay: whether an active alarm is still justified (None: the same as `start`).
        """
        if self.active:
            self._quiet = 0 if (start if stay is None else start or stay) else self._quiet + 1
            if self._quiet >= self._calm:
                self.onset, self._began, self._cleared = None, None, step
                self._held = self._quiet = 0
            return False
        pausing = self._cleared is not None and 0 <= step - self._cleared <= self._refractory
        if not start or (pausing and self._refractory):
            self._held, self._began = 0, None
            return False
        self._began = step if self._began is None else self._began
        self._held += 1
        if self._held < self._needed:
            return False
        self.onset, self._quiet = self._began, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "held": self._held,
            "quiet": self._quiet,
            "began": self._began,
            "cleared": self._cleared,
            "onset": self.onset,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._held, self._quiet = state["held"], state["quiet"]
        self._began, self._cleared, self.onset = state["began"], state["cleared"], state["onset"]
