"""From a condition at single measured steps to an alarm: persistence before, hysteresis after."""

from collections.abc import Mapping
from typing import Any


class Alarm:
    """Raised after a condition held at `needed` frames in a row, cleared after `calm` frames in a row without it.

    Args:
        needed: frames in a row before the alarm is raised; one odd frame is none.
        calm: frames in a row without the condition before it is cleared.
    """

    def __init__(self, *, needed: int, calm: int = 3) -> None:
        self._needed = needed
        self._calm = calm
        self._held = 0
        self._quiet = 0
        self._began: int | None = None
        self.onset: int | None = None
        """Step at which the condition that raised the alarm began; None while it is off."""
        self.just_cleared = False

    @property
    def active(self) -> bool:
        return self.onset is not None

    def see(self, step: int, *, start: bool, stay: bool | None = None) -> bool:
        """Takes one frame; True where the alarm is raised at it.

        Args:
            step: the frame's step, or the step at which what it shows began.
            start: whether the condition for raising holds.
            stay: whether an active alarm is still justified (None: the same as `start`).
        """
        self.just_cleared = False
        if self.active:
            self._quiet = 0 if (start if stay is None else start or stay) else self._quiet + 1
            if self._quiet >= self._calm:
                self.onset, self._began = None, None
                self._held = self._quiet = 0
                self.just_cleared = True
            return False
        if not start:
            self._held, self._began = 0, None
            return False
        self._began = step if self._began is None else self._began
        self._held += 1
        if self._held < self._needed:
            return False
        self.onset, self._quiet = self._began, 0
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"held": self._held, "quiet": self._quiet, "began": self._began, "onset": self.onset}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._held, self._quiet = state["held"], state["quiet"]
        self._began, self.onset = state["began"], state["onset"]
