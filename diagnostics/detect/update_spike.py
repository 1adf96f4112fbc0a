"""Update spike: a matrix's update is suddenly several times as large, beside the matrix, as it used to be.

The signal is the ratio sigma1(dW) / sigma1(W) over the median of its own 8 measurements that are at least two
measurements old: the two that an alarm needs must not be their own yardstick. The level says little (0.05 to 0.2 in
healthy runs before step 100, 25 at step 0 where W starts at zero); the jump is often the only warning of an abrupt
failure, and the main source of false ones. Hence what does not count: the first 30 steps, jumps below 2, ratios below
1e-3, whatever happens while the loss clearly falls, and the share of a jump that the schedule explains (an update is
proportional to the learning rate: where that has risen, the yardsticks from before are raised with it).

Blind spots: the rate is that of the first parameter group; a matrix that did not move (ratio 0: frozen, or a step that
was skipped) has no yardstick, so the first measurements after it was thawed are not judged.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect import exact
from diagnostics.detect.band_words import below
from diagnostics.detect.bands import PLAIN, Band
from diagnostics.detect.block import Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import Finding, in_words, rounded
from diagnostics.detect.window import Window

PAST = 8
BACK = 2
LEAST_KNOWN = 4
LEAST_RATIO = 1e-3
LEAST_JUMP = 2.0
LEAST_AGE = 30
_REACH = PAST + BACK - 1
ADVICE = (
    "`diagnostics control RUN spectral-bound --tau 0.01` keeps every update below 1 % of its matrix; look at the "
    "batches of these steps, clip gradients; if the loss follows the jump, go back to a checkpoint from before it and "
    "lower the learning rate"
)


class UpdateSpike(Detector):
    """Warning: updates far above the run's own band, two measurements in a row."""

    kind = "update-spike"
    over = "parameters"
    needed = 2

    def __init__(self, band: Band) -> None:
        super().__init__(band)
        self._rates = [np.nan] * _REACH
        """Learning rates at the frames before the window's, oldest first."""

    def signal(self, window: Window) -> Values:
        now, past, risen = window.now("ratio"), self._past(window), self._rises(window)
        frames = len(window)
        counts = (now >= LEAST_RATIO) & ((window.age >= LEAST_AGE) & ~window.loss.falling)[:, None]
        known, exceeded = (np.zeros(now.shape, dtype=np.int64) for _ in range(2))
        for back in range(PAST):
            usual = past[back : back + frames] * risen[:, back : back + 1]
            known += usual > 0.0
            exceeded += now >= LEAST_JUMP * usual
        judged = np.isfinite(now) & (known >= LEAST_KNOWN)
        # Sorting is dear: a median can be exceeded only where half of its values are.
        rows, columns = np.nonzero(judged & counts & (2 * exceeded >= known))
        usual = exact.median(past[rows[:, None] + np.arange(PAST), columns[:, None]] * risen[rows])
        jump = np.where(judged, 0.0, np.nan)
        jump[rows, columns] = now[rows, columns] / usual
        return np.where(jump < LEAST_JUMP, 0.0, jump)

    @staticmethod
    def _past(window: Window) -> Values:
        """The ratios held, from `_REACH` frames before the first new one on; NaN where a matrix did not move."""
        ratios = window.columns["ratio"]
        first = len(ratios) - len(window) - _REACH
        before = np.full((max(0, -first), ratios.shape[1]), np.nan)
        held = ratios[max(0, first) :]
        return np.concatenate([before, np.where((held > 0.0) & (held < np.inf), held, np.nan)])

    def _rises(self, window: Window) -> Values:
        """(F, PAST) how far the learning rate has risen since each frame before; 1 where it fell or is not known."""
        rates = np.concatenate([self._rates, window.lr.last()])
        before = rates[np.arange(len(window))[:, None] + np.arange(PAST)]
        with np.errstate(invalid="ignore", over="ignore"):
            risen = rates[_REACH:, None] / np.where(before > 0.0, before, np.nan)
        return np.asarray(np.fmax(risen, 1.0))

    def feed(self, window: Window) -> list[Finding]:
        raised = super().feed(window)
        self._rates = [*self._rates, *window.lr.last()[-_REACH:].tolist()][-_REACH:]
        return raised

    def describe(self, window: Window, frame: int, column: int) -> Words:
        ratio = float(window.now("ratio")[frame, column])
        jumps = self.signal(window)[frame]
        usual = ratio / float(jumps[column])
        name = window.parameters[column]
        evidence = {
            "parameter": name,
            "ratio": rounded(ratio),
            "ratio_healthy": f"about {in_words(usual)}, the median of its measurements before",
            "jump": rounded(jumps[column]),
            "jump_healthy": below(self.band, self.band.of(PLAIN), in_words),
            "matrices_spiking": int((jumps >= self.band.of(PLAIN)).sum()),
            "matrices": len(window.parameters),
            "lr": float(window.lr.last()[frame]) if np.isfinite(window.lr.last()[frame]) else None,
        }
        message = (
            f"the update of {name} jumped to {in_words(ratio)} of the matrix, {in_words(jumps[column])} times what it "
            "used to be in this run at this learning rate"
        )
        return Words(evidence, message, ADVICE)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rates": list(self._rates)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._rates = list(state["rates"])
