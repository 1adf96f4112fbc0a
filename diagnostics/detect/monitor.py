"""All detectors over one run: live beside the recorder, or replayed from its tables."""

from collections.abc import Mapping
from typing import Any

from diagnostics.detect.bands import Bands, shipped_bands
from diagnostics.detect.block import Block
from diagnostics.detect.coverage import Coverage
from diagnostics.detect.detector import Detector
from diagnostics.detect.detectors import DETECTORS
from diagnostics.detect.finding import STATUSES, Finding
from diagnostics.detect.forecast import forecast
from diagnostics.detect.history import History, flags_of
from diagnostics.detect.window import Window


class Monitor:
    """Feeds every detector and sums up: findings, status, forecast, what could not be judged.

    Args:
        sites: what run.json says of the attention sites: bands and rules know their flags.
        bands: the bands to judge by (None: those that ship).
    """

    def __init__(self, sites: object = (), bands: Bands | None = None) -> None:
        by_name = shipped_bands() if bands is None else bands
        self._detectors: dict[str, Detector] = {
            name: detector(by_name[name]) for name, detector in DETECTORS.items()
        }
        self._flags = flags_of(sites)
        self._history = History()
        self.step: int | None = None
        self.forecast: dict[str, Any] | None = None
        self._coverage = Coverage()

    def see_sites(self, sites: object) -> None:
        """Takes what is known of the sites by now."""
        self._flags = flags_of(sites)

    def feed(self, block: Block) -> list[Finding]:
        """Takes the next frames; returns the findings raised at them, in the order of their steps."""
        if not len(block):
            return []
        self.step = int(block.steps[-1])
        self._coverage.see(block)
        window = self._history.window(block, self._flags)
        raised = [finding for detector in self._detectors.values() for finding in detector.feed(window)]
        self.forecast = self._forecast(window)
        return sorted(raised, key=lambda finding: finding.raised_step or 0)

    def _forecast(self, window: Window) -> dict[str, Any] | None:
        collapsed = self.status() in ("collapsed", "diverged")
        return None if collapsed else forecast(window)

    def findings(self) -> list[Finding]:
        """Every finding so far, as it stands now."""
        return [finding for detector in self._detectors.values() for finding in detector.findings()]

    def status(self) -> str:
        """The worst status among the active findings; `no-data` where nothing could be judged."""
        if not self._coverage.any:
            return "no-data"
        return max((f.status for f in self.findings() if f.active), key=STATUSES.index, default="healthy")

    def missing(self) -> list[str]:
        """Sentences on what was not there to be judged."""
        return self._coverage.missing()

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": 2,
            "step": self.step,
            "coverage": self._coverage.state_dict(),
            "history": self._history.state_dict(),
            "detectors": {name: detector.state_dict() for name, detector in self._detectors.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("version") != 2:  # noqa: PLR2004 - windows of an older version mean nothing to these rules
            return
        self.step = state["step"]
        self._coverage.load_state_dict(state["coverage"])
        self._history.load_state_dict(state["history"])
        for name, detector in self._detectors.items():
            if name in state["detectors"]:
                detector.load_state_dict(state["detectors"][name])
