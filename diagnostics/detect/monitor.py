"""All detectors over one run: live beside the recorder, or replayed from its tables."""

from collections.abc import Mapping
from typing import Any

from diagnostics.detect.detector import Detector
from diagnostics.detect.divergence import Divergence
from diagnostics.detect.entropy_collapse import EntropyCollapse
from diagnostics.detect.finding import STATUSES, Finding
from diagnostics.detect.frame import Frame
from diagnostics.detect.loss_stall import LossStall
from diagnostics.detect.spectral_concentration import SpectralConcentration

DETECTORS: dict[str, type[Detector]] = {
    "entropy_collapse": EntropyCollapse,
    "spectral_concentration": SpectralConcentration,
    "loss_stall": LossStall,
    "divergence": Divergence,
}
"""A new pathology is one file and one line here."""


class Monitor:
    """Feeds every detector and sums up: findings, status, what could not be judged."""

    def __init__(self) -> None:
        self._detectors = {name: detector() for name, detector in DETECTORS.items()}
        self.step: int | None = None
        self._saw_loss = False
        self._saw_attention = False
        self._saw_spectra = False
        self._frames = 0

    def feed(self, frame: Frame) -> list[Finding]:
        """Takes the next frame; returns the findings raised at it."""
        self.step = frame.step
        self._frames += 1
        self._saw_loss |= bool(frame.loss_given.any())
        self._saw_attention |= bool(frame.attention)
        self._saw_spectra |= bool(frame.spectra)
        return [finding for detector in self._detectors.values() for finding in detector.feed(frame)]

    def findings(self) -> list[Finding]:
        """Every finding so far, as it stands now."""
        return [finding for detector in self._detectors.values() for finding in detector.findings()]

    def status(self) -> str:
        """The worst status among the active findings; `no-data` where nothing could be judged."""
        if not (self._saw_loss or self._saw_attention or self._saw_spectra):
            return "no-data"
        return max((f.status for f in self.findings() if f.active), key=STATUSES.index, default="healthy")

    def missing(self) -> list[str]:
        """Sentences on what was not there to be judged."""
        if self.step is None:
            return ["the run has no steps yet"]
        missing = []
        if not self._saw_loss:
            missing.append("no loss was handed to recorder.step: divergence and stalls are not judged")
        if not self._saw_attention:
            missing.append("no attention entropy was observed: entropy collapse is not judged")
        if not self._saw_spectra:
            missing.append("no spectra of Wq^T Wk were measured: spectral energy concentration is not judged")
        return missing

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "frames": self._frames,
            "saw": [self._saw_loss, self._saw_attention, self._saw_spectra],
            "detectors": {name: detector.state_dict() for name, detector in self._detectors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step, self._frames = state["step"], state["frames"]
        self._saw_loss, self._saw_attention, self._saw_spectra = state["saw"]
        for name, detector in self._detectors.items():
            if name in state["detectors"]:
                detector.load_state_dict(state["detectors"][name])
