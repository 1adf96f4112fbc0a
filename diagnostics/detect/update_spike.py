"""Update spike: a matrix's update is suddenly several times as large, beside the matrix, as it used to be.

The signal is the ratio sigma1(dW) / sigma1(W), the lowest within 15 steps, over the median of its own 8 measurements
before (`yardstick.py`). The level says little (0.05 to 0.2 in healthy runs before step 100, 25 at step 0 where W starts
at zero); the jump is often the only warning of an abrupt failure, and the main source of false ones. Hence what does
not count: the first 30 steps, jumps below 2, ratios below 1e-3, whatever happens while the loss clearly falls, and the
share of a jump that the schedule explains (an update is proportional to the learning rate: where that has risen, the
yardsticks from before are raised with it). A jump that the median matrix makes too is the optimizer's (moments lost, a
loss scaled anew) and mostly heals: it counts for a quarter, the excess over the median in full. A sixth counts
while the largest logit of the run is below 5: attention forms by just such a jump.

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
from diagnostics.detect.yardstick import LEAST_KNOWN, PAST, REACH, Lookback, began, with_past

LEAST_RATIO = 1e-3
LEAST_JUMP = 2.0
LEAST_AGE = 30
FEWEST = 4
"""Matrices of which one can be told apart from the others."""
COMMON_SHARE = 0.25
"""What a jump counts for that all matrices make alike."""
FORMING_SHARE = 1 / 6
"""What it counts for while attention forms."""
FORMED_LOGIT = 5.0
"""Below a largest logit of this, growing updates of queries and keys are how a model leaves its first plateau."""
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
        self._rates = [np.nan] * REACH
        """Learning rates at the frames before the window's, oldest first."""
        self._commons = [1.0] * PAST
        """Jumps of the median matrix there."""

    def signal(self, window: Window) -> Values:
        jump, commons = self._jumps(window)
        # While a jump of all heals, some matrices are later than others: for them it is still the jump of all.
        lately = np.max([commons[at : at + len(window)] for at in range(PAST + 1)], axis=0)
        with np.errstate(invalid="ignore"):
            forming = exact.largest(window.now("max_logit")) < FORMED_LOGIT
        share = np.where(forming, FORMING_SHARE, np.maximum(1.0 / lately, COMMON_SHARE))
        return np.asarray(share[:, None] * jump)

    def _jumps(self, window: Window) -> tuple[Values, Values]:
        """(F, P) how far every matrix jumped; (PAST + F,) how far the median one did, at frames before as well."""
        if self.kind not in window.memo:
            window.memo[self.kind] = self._work_out(window)
        found: tuple[Values, Values] = window.memo[self.kind]
        return found

    def _work_out(self, window: Window) -> tuple[Values, Values]:
        now, back, ratios = window.now("ratio"), Lookback.of(window), self._ratios(window)
        lowest, risen = back.lowest(ratios), self._rises(window, back)
        counts = (now >= LEAST_RATIO) & (lowest >= LEAST_RATIO)
        counts &= ((window.age >= LEAST_AGE) & ~window.loss.falling)[:, None]
        known, exceeded = (np.zeros(now.shape, dtype=np.int64) for _ in range(2))
        for at in range(PAST):
            usual = ratios[back.past[:, at]] * risen[:, at : at + 1]
            known += usual > 0.0
            exceeded += lowest >= LEAST_JUMP * usual
        judged = np.isfinite(now) & (known >= LEAST_KNOWN)
        # Sorting is dear: a median can be exceeded only where half of its values are.
        frames, columns = np.nonzero(judged & counts & (2 * exceeded >= known))
        usual = exact.median(ratios[back.past[frames], columns[:, None]] * risen[frames])
        jump = np.where(judged, 0.0, np.nan)
        jump[frames, columns] = lowest[frames, columns] / usual
        jump = np.where(jump < LEAST_JUMP, 0.0, jump)
        common = np.where(judged.sum(axis=1) >= FEWEST, np.fmax(exact.median(jump), 1.0), 1.0)
        return jump, np.concatenate([self._commons, common])

    @staticmethod
    def _ratios(window: Window) -> Values:
        """(REACH + F, P): the ratios with those before; NaN where a matrix did not move."""
        held = with_past(window.columns["ratio"], window)
        return np.where((held > 0.0) & (held < np.inf), held, np.nan)

    def _rises(self, window: Window, back: Lookback) -> Values:
        """(F, PAST) how far the learning rate has risen since each frame of the past; 1 where it fell or is not known."""
        rates = np.concatenate([self._rates, window.lr.last()])
        before = rates[back.past]
        with np.errstate(invalid="ignore", over="ignore"):
            risen = rates[back.here, None] / np.where(before > 0.0, before, np.nan)
        return np.asarray(np.fmax(risen, 1.0))

    def feed(self, window: Window) -> list[Finding]:
        raised = super().feed(window)
        self._commons = self._jumps(window)[1][-PAST:].tolist()
        self._rates = [*self._rates, *window.lr.last()[-REACH:].tolist()][-REACH:]
        return raised

    def _finding(self, window: Window, frame: int, column: int, *, first_step: int, step: int) -> Finding:
        first_step = began(window, first_step, step)
        return super()._finding(window, frame, column, first_step=first_step, step=step)

    def describe(self, window: Window, frame: int, column: int) -> Words:
        ratio = float(Lookback.of(window).lowest(self._ratios(window))[frame, column])
        jumps, counted = self._jumps(window)[0][frame], self.signal(window)[frame]
        usual = ratio / float(jumps[column])
        name = window.parameters[column]
        evidence = {
            "parameter": name,
            "ratio": rounded(ratio),
            "ratio_healthy": f"about {in_words(usual)}, the median of its measurements before",
            "jump": rounded(jumps[column]),
            "jump_beyond_the_others": rounded(counted[column]),
            "jump_beyond_the_others_healthy": below(self.band, self.band.of(PLAIN), in_words),
            "matrices_spiking": int((counted >= self.band.of(PLAIN)).sum()),
            "matrices": len(window.parameters),
            "lr": float(window.lr.last()[frame]) if np.isfinite(window.lr.last()[frame]) else None,
        }
        message = (
            f"the update of {name} jumped to {in_words(ratio)} of the matrix, {in_words(jumps[column])} times what it "
            "used to be in this run at this learning rate"
        )
        return Words(evidence, message, ADVICE)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rates": list(self._rates), "commons": list(self._commons)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._rates, self._commons = list(state["rates"]), list(state["commons"])
