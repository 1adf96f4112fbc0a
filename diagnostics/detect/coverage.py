"""What of a run was there to be judged, and what was not."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect.block import Block
from diagnostics.detect.window import GROWTH_STEPS

_NEVER = {
    "loss": "no loss was handed to recorder.step: divergence and stalls are not judged",
    "attention": "no attention entropy was observed: entropy collapse is not judged",
    "spectra": "no spectra of Wq^T Wk were measured: spectral energy concentration is not judged",
    "updates": "no weight updates were observed: update spikes are not judged",
}


class Coverage:
    """Counts frames, and in how many of them each kind of measurement was there."""

    def __init__(self) -> None:
        self._frames = 0
        self._seen = dict.fromkeys(_NEVER, 0)
        self._steps = 0
        self._skipped = 0
        self._first: int | None = None
        self._last: int | None = None

    @property
    def any(self) -> bool:
        """Whether there was anything to judge a run by."""
        return any(self._seen[name] for name in ("loss", "attention", "spectra"))

    def see(self, block: Block) -> None:
        """Takes the next frames."""
        self._frames += len(block) if block.measured is None else int(np.count_nonzero(block.measured))
        self._steps += len(block.every_step)
        if len(block.every_step):
            first, last = int(block.every_step[0]), int(block.every_step[-1])
            before = first - 1 if self._last is None else self._last
            self._skipped += last - before - len(block.every_step)
            self._first = first if self._first is None else self._first
            self._last = last
        self._seen["loss"] += int(np.count_nonzero(block.loss_given))
        for name, table in (
            ("attention", block.attention),
            ("spectra", block.spectra),
            ("updates", block.updates),
        ):
            observed = [~np.isnan(column).all(axis=1) for column in table.values()]
            if observed:
                self._seen[name] += int(np.count_nonzero(np.logical_or.reduce(observed)))

    def missing(self) -> list[str]:
        """Sentences on what was not there to be judged."""
        if self._first is None or self._last is None:
            return ["the run has no steps yet"]
        sentences = [sentence for name, sentence in _NEVER.items() if not self._seen[name]]
        if self._seen["loss"] and self._seen["loss"] < self._steps / 2:
            sentences.append(f"a loss was handed in at {self._seen['loss']} of {self._steps} steps only")
        for name in ("attention", "spectra"):
            missed = self._frames - self._seen[name]
            if self._seen[name] and missed > 0:
                sentences.append(
                    f"{name} was observed at {self._seen[name]} of {self._frames} measured steps only"
                )
        if self._skipped > 0:
            sentences.append(
                f"{self._skipped} steps between {self._first} and {self._last} are not on record"
            )
        if self.any and self._last - self._first < GROWTH_STEPS:
            sentences.append(
                f"the run has come {self._last - self._first + 1} steps: growth over {GROWTH_STEPS} steps is judged by what "
                "there is"
            )
        return sentences

    def state_dict(self) -> dict[str, Any]:
        return {
            "frames": self._frames,
            "seen": dict(self._seen),
            "steps": self._steps,
            "skipped": self._skipped,
            "first": self._first,
            "last": self._last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._frames, self._seen = state["frames"], dict(state["seen"])
        self._steps, self._skipped = state["steps"], state["skipped"]
        self._first, self._last = state["first"], state["last"]
