"""All detectors over one run: live beside the recorder, or replayed from its tables."""

from collections.abc import Mapping
from typing import Any

from diagnostics.detect.finding import STATUSES, Finding
from diagnostics.detect.frame import Frame


class Monitor:
    """stub while being written"""

    def __init__(self) -> None:
        self.step: int | None = None

    def feed(self, frame: Frame) -> list[Finding]:
        self.step = frame.step
        return []

    def findings(self) -> list[Finding]:
        return []

    def status(self) -> str:
        return "healthy" if self.step is not None else "no-data"

    def missing(self) -> list[str]:
        return []

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
