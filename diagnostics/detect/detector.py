"""What every detector is."""

from collections.abc import Mapping
from typing import Any, Protocol

from diagnostics.detect.finding import Finding
from diagnostics.detect.frame import Frame


class Detector(Protocol):
    """Streaming: takes frames in step order, keeps its findings, looks at nothing else.

    `feed` returns the findings raised at this frame; `findings` all so far, each as it stands now.
    """

    def feed(self, frame: Frame) -> list[Finding]: ...

    def findings(self) -> list[Finding]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
