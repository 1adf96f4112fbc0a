"""Loss spike: five losses in a row far above nearly all of the 64 before them, the sooner if the gradient norm shifts.

A single loss, however high, is often one hard batch; where batches come in kinds (mixup, several tasks) a window's
mean and deviation say little. Asking the lowest of five to leave the upper tenth of the window needs neither a
shape of the noise nor a single outlier to be real. A gradient norm that takes another level at the same time, higher
or lower, counts as evidence too; alone it tells nothing. The figures on public training logs are in
`sample_runs/evaluate/real_logs.py`: this notices damage within a few steps, it does not foresee it.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from diagnostics.detect.block import Ints, Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import Finding, in_words, rounded
from diagnostics.detect.per_step import PerStep
from diagnostics.detect.window import Window

IN_A_ROW = 5
USUAL_STEPS = 64
LEAST_STEPS = 20
UPPER_SHARE = 0.9
SPREAD_FLOOR = 0.02
"""Least spread, as a share of the usual loss: a loss that hardly varies is not allowed to alarm over nothing."""
FIRST_FLOOR = 0.001
"""And as a share of the loss at the start: near zero, a finished training jumps by multiples of itself."""
TINY = 1e-6
"""Where both are zero; float32 does not resolve less."""
NORM_STEPS = 5
NORM_FLOOR = 0.05
"""Least spread of ln(gradient norm)."""
NORM_MOST = 5.0
"""What a shift of the gradient norm counts for at most, in spreads."""
QUARTILES_OF_NORMAL = 1.349
"""The quartiles of a normal distribution lie this many standard deviations apart."""
ADVICE = (
    "look at the findings just before it and at the batches of these steps; a spike that heals within some tens of steps "
    "cost little, one that stays is a crash: restart from a checkpoint before it with a lower learning rate or gradient clipping"
)


class Jumps(NamedTuple):
    """Steps whose lowest of five losses exceeds the middle of those before, (J,) each.

    Attributes:
        at: index among the losses known; lowest: of the five that end there.
        middle, upper, spread: of the losses before those.
        shift: of the gradient norm's level, in its spreads; 0 where it is not known.
        score: spreads above the upper tenth, plus the shift.
    """

    at: NDArray[np.int64]
    lowest: Values
    middle: Values
    upper: Values
    spread: Values
    shift: Values
    score: Values


class LossSpike(Detector):
    """Warning; status at risk until the loss is back among its usual values, or these have become the usual ones."""

    kind = "loss-spike"
    over = "run"
    needed = 1
    stay_share = 0.2

    def signal(self, window: Window) -> Values:
        """The highest score of a jump among the frame's steps, 0 where there is none; NaN where none could be judged."""
        known = window.loss.per_step
        jumps = jumps_from(window, int(known.begins[0]) if len(window) else 0)
        # The frame of a jump is the first that ends behind it.
        frame = np.searchsorted(known.ends, jumps.at, side="right")
        score = np.where((known.ends > known.begins) & (known.ends >= IN_A_ROW + LEAST_STEPS), 0.0, np.nan)
        np.maximum.at(score, frame, jumps.score)
        return score[:, None]

    def describe(self, window: Window, frame: int, column: int) -> Words:
        del column
        jumps, worst = _worst(window, frame)
        usual, lowest = float(jumps.middle[worst]), float(jumps.lowest[worst])
        evidence: dict[str, Any] = {
            f"loss_lowest_of_{IN_A_ROW}": rounded(lowest),
            "loss_usual": rounded(usual),
            "loss_usual_upper": rounded(float(jumps.upper[worst])),
            "loss_spread": rounded(float(jumps.spread[worst])),
            "grad_norm_shift": rounded(float(jumps.shift[worst])),
            "spreads_above": rounded(float(jumps.score[worst])),
            "spreads_above_healthy": [0.0, rounded(self.band.of("plain"))],
        }
        message = f"the loss jumped from about {in_words(usual)} to {in_words(lowest)} or more, {IN_A_ROW} steps in a row"
        return Words(evidence, message, ADVICE)

    def _finding(self, window: Window, frame: int, column: int, *, first_step: int, step: int) -> Finding:
        jumps, worst = _worst(window, frame)
        began = int(window.loss.per_step.steps[int(jumps.at[worst]) - IN_A_ROW + 1])
        return super()._finding(window, frame, column, first_step=min(first_step, began), step=step)


def jumps_from(window: Window, first: int) -> Jumps:
    """Jumps among the losses known from index `first` on."""
    known = window.loss.per_step
    values = known.values
    at = np.arange(max(first, IN_A_ROW - 1 + LEAST_STEPS), len(values))
    lowest = np.min([values[at - back] for back in range(IN_A_ROW)], axis=0)
    before = _before_each(values, at - IN_A_ROW + 1)
    count = np.minimum(at - IN_A_ROW + 1, USUAL_STEPS)
    # Half of the rest is sorted out by counting: to sort the past of every step would cost more than all else.
    out = np.flatnonzero(np.count_nonzero(before < lowest[:, None], axis=1) > _rank(count, 0.5))
    at, lowest, ordered, count = at[out], lowest[out], np.sort(before[out], axis=1), count[out]
    middle, upper = _ranked(ordered, count, 0.5), _ranked(ordered, count, UPPER_SHARE)
    floor = np.maximum(SPREAD_FLOOR * np.abs(middle), max(FIRST_FLOOR * _start_level(window), TINY))
    spread = np.maximum(_quartile_spread(ordered, count), floor)
    shift = _norm_shift(window.grad_norm, known.steps[at])
    return Jumps(at, lowest, middle, upper, spread, shift, np.maximum((lowest - upper) / spread + shift, 0.0))


def _worst(window: Window, frame: int) -> tuple[Jumps, int]:
    """The jumps from a frame on, and which of them is the worst of that frame."""
    known = window.loss.per_step
    jumps = jumps_from(window, int(known.begins[frame]))
    return jumps, int(np.argmax(np.where(jumps.at < known.ends[frame], jumps.score, -1.0)))


def _norm_shift(norms: PerStep, steps: Ints) -> Values:
    """How far the level of ln(gradient norm) at these steps lies from that of the 64 before, either way, in spreads."""
    end = np.searchsorted(norms.steps, steps, side="right")
    shift = np.zeros(len(steps))
    known = np.flatnonzero(end >= NORM_STEPS + LEAST_STEPS)
    if len(known):
        logs = np.log(np.maximum(norms.values, np.finfo(np.float64).tiny))
        begin = end[known] - NORM_STEPS
        now = np.sort(logs[begin[:, None] + np.arange(NORM_STEPS)], axis=1)[:, NORM_STEPS // 2]
        ordered = np.sort(_before(logs, begin), axis=1)
        count = np.minimum(begin, USUAL_STEPS)
        spread = np.maximum(_quartile_spread(ordered, count), NORM_FLOOR)
        shift[known] = np.minimum(np.abs(now - _ranked(ordered, count, 0.5)) / spread, NORM_MOST)
    return shift


def _before(values: Values, ends: NDArray[np.int64]) -> Values:
    """(J, 64): the values before each index; NaN where there are fewer."""
    index = ends[:, None] - USUAL_STEPS + np.arange(USUAL_STEPS)
    return (
        np.where(index >= 0, values[np.maximum(index, 0)], np.nan)
        if len(values)
        else np.empty((0, USUAL_STEPS))
    )


def _before_each(values: Values, ends: NDArray[np.int64]) -> Values:
    """The same for indices that follow one another: a view, for it is large."""
    if not len(ends):
        return np.empty((0, USUAL_STEPS))
    first = int(ends[0]) - USUAL_STEPS
    padded = np.concatenate([np.full(max(0, -first), np.nan), values[max(0, first) : int(ends[-1])]])
    return sliding_window_view(padded, USUAL_STEPS)


def _rank(count: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    return np.asarray(share * (count - 1) + 0.5).astype(np.int64)


def _ranked(ordered: Values, count: NDArray[np.int64], share: float) -> Values:
    """The value at a share of the first `count` in each sorted row."""
    return np.asarray(ordered[np.arange(len(ordered)), _rank(count, share)])


def _quartile_spread(ordered: Values, count: NDArray[np.int64]) -> Values:
    return (_ranked(ordered, count, 0.75) - _ranked(ordered, count, 0.25)) / QUARTILES_OF_NORMAL


def _start_level(window: Window) -> float:
    """Size of the loss at the start: known by the time that twenty losses are, the least that are judged."""
    first = window.loss.first[~np.isnan(window.loss.first)]
    return abs(float(first[0])) if len(first) else 0.0
