"""What became of a run, by a fixed rule on its loss alone: no signal that a detector reads is looked at.

Words:
    smooth: at each step the median of the last 11 losses (from the fifth loss on); a loss that is not finite counts
        as infinite.
    chance: loss of the best constant prediction, known of the task.
    final: median of the last 20 losses.
    reference: the run with the lowest final loss among those of one family, task, batch, label noise and length.
    covered: (chance - final) / (chance - final of the reference): the share of what can be learned in so many steps
        beyond a constant prediction. The fall from the first loss would not do: on text, two thirds of it are had by
        learning how frequent each byte is.
    scatter: standard deviation of the single losses about their course, from the median of the absolute differences
        of neighbouring losses up to the lowest smooth one.
    level: the lowest smooth loss so far + margin. The margin is a quarter of the lowest as in the rule of public logs,
        but no more than half of what the run has learned beyond chance (with a high chance a quarter of the loss is
        more than there is to lose), and at least 0.3 nats and 2.3 times the scatter: six times the standard error of
        a median of 11, about as far as the smooth loss of a run that stands still wanders.
    excursion: from the step where the smooth loss rises above the level until it is back at that level. Its onset is
        the first single loss above the level from which on three quarters are above it until the smooth loss is:
        the median's lateness is not in it, nor a single high loss before.

Labels, the first that holds:
    crash: an excursion that lasts to the end, or that takes up at least 0.4 of the steps from its onset on; a loss
        that is not finite lasts to the end where nothing finite follows. The run had covered half of what the reference
        learned before it, or it began before the reference had: what was not learned in time cannot be lost later.
        The onset is the excursion's.
    never-learned: the lowest smooth loss covers less than half of what the reference learned. The onset is the step
        by which the reference had covered half.
    degraded: it ended with less than 0.8 of the reference, neither broken nor sound; scored neither way.
    spike-recovered: there was an excursion, and it was over in time.
    healthy: none of these.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]

SMOOTHED_OVER = 11
FIRST_SMOOTH = 4
FINAL_OVER = 20
LEAST_MARGIN = 0.3
SCATTERS = 2.3
MOSTLY = 0.75
LASTS = 0.4
LEARNED = 0.5
SOUND = 0.8
LEAST = 0.2
"""Nats below chance that a reference has learned: with less, noise would decide of the others."""

HEALTHY = "healthy"
SPIKE = "spike-recovered"
DEGRADED = "degraded"
NEVER = "never-learned"
CRASH = "crash"
FAILING = (CRASH, NEVER)


@dataclass(frozen=True)
class Reference:
    """What a run could have learned.

    Attributes:
        final: final loss of the best run, nats.
        half_step: the step by which that run had covered half of what it learned.
    """

    final: float
    half_step: int


@dataclass(frozen=True)
class Label:
    """What became of a run.

    Attributes:
        label: one of the five.
        onset_step: where it began; None where it is healthy or degraded.
        recovered_step: of a spike, the first step behind the last excursion.
        final_loss: nats; infinite where the run ended in losses that are not finite.
        covered: share of what the reference learned.
    """

    label: str
    onset_step: int | None
    recovered_step: int | None
    final_loss: float
    covered: float


@dataclass(frozen=True)
class Excursion:
    """Smooth losses above a level: from `onset`, seen from `begin` on, to before `end`; `lowest`: that before it."""

    onset: int
    begin: int
    end: int
    lowest: float


def smooth(losses: ArrayLike) -> Values:
    """The running median, infinite where most losses are not finite; NaN before the fifth loss."""
    loss_s = _with_infinities(losses)
    padded_s = np.concatenate([np.full(SMOOTHED_OVER - 1, np.nan), loss_s])
    windows_sw = sliding_window_view(padded_s, SMOOTHED_OVER)
    smooth_s = np.full(len(loss_s), np.nan)
    smooth_s[FIRST_SMOOTH:] = np.nanmedian(windows_sw[FIRST_SMOOTH:], axis=1)
    return smooth_s


def final_loss(losses: ArrayLike) -> float:
    return float(np.median(_with_infinities(losses)[-FINAL_OVER:]))


def reference_of(runs: Iterable[ArrayLike], chance: float) -> Reference | None:
    """The best of some runs of the same data and model; None where even the best did not learn `LEAST` nats."""
    best = min((np.asarray(losses, dtype=np.float64) for losses in runs), key=final_loss, default=None)
    if best is None or (final := final_loss(best)) > chance - LEAST:
        return None
    half = chance - LEARNED * (chance - final)
    return Reference(final, int(np.argmax(smooth(best) <= half)))


def label_of(losses: ArrayLike, *, chance: float, reference: Reference) -> Label:
    """Judges one run.

    Args:
        losses: one a step, nats, in step order from step 0.
        chance: loss of the best constant prediction, nats.
        reference: of `reference_of`.
    """
    smooth_s = smooth(losses)
    final = final_loss(losses)
    learnable = chance - reference.final
    covered = (chance - final) / learnable
    best_covered = (chance - float(np.nanmin(smooth_s))) / learnable
    excursions = excursions_of(losses, chance)
    count = len(smooth_s)
    for found in excursions:
        lasts = found.end == count or found.end - found.begin >= LASTS * (count - found.onset)
        had_learned = chance - found.lowest >= LEARNED * learnable
        if lasts and (had_learned or found.onset <= reference.half_step):
            return Label(CRASH, found.onset, None, final, covered)
    if best_covered < LEARNED:
        return Label(NEVER, min(reference.half_step, count - 1), None, final, covered)
    if covered < SOUND:
        return Label(DEGRADED, None, None, final, covered)
    if excursions:
        return Label(SPIKE, excursions[0].onset, excursions[-1].end, final, covered)
    return Label(HEALTHY, None, None, final, covered)


def excursions_of(losses: ArrayLike, chance: float) -> list[Excursion]:
    """All excursions of a loss curve, in order."""
    loss_s, smooth_s = _with_infinities(losses), smooth(losses)
    found: list[Excursion] = []
    noise = scatter(losses)
    lowest, step = np.inf, FIRST_SMOOTH
    while step < len(smooth_s):
        # Before there is a finite one, only an infinite loss is above all.
        level = lowest + margin(lowest, chance, noise) if np.isfinite(lowest) else np.finfo(np.float64).max
        if smooth_s[step] > level:
            back = np.flatnonzero(smooth_s[step:] <= level)
            end = step + int(back[0]) if len(back) else len(smooth_s)
            found.append(Excursion(_onset(loss_s, step, level), step, end, float(lowest)))
            step = end
        else:
            lowest = min(lowest, float(smooth_s[step]))
            step += 1
    return found


def margin(lowest: float, chance: float, noise: float) -> float:
    """How far above its lowest smooth loss a run may go, nats."""
    return max(LEAST_MARGIN, SCATTERS * noise, min(0.25 * abs(lowest), 0.5 * (chance - lowest)))


def scatter(losses: ArrayLike) -> float:
    """Standard deviation of the single losses about their course, up to the lowest smooth one; nats."""
    loss_s = _with_infinities(losses)
    smooth_s = smooth(losses)
    until = loss_s[: int(np.nanargmin(smooth_s)) + 1]
    finite = until[np.isfinite(until)]
    if len(finite) < SMOOTHED_OVER:
        return 0.0
    # Of normal noise the median absolute deviation is sigma / 1.4826, and a difference has twice its variance.
    return float(1.4826 / np.sqrt(2.0) * np.median(np.abs(np.diff(finite))))


def _onset(loss_s: Values, begin: int, level: float) -> int:
    """The step from which on most losses up to `begin` are above the level."""
    above = loss_s[max(0, begin - SMOOTHED_OVER + 1) : begin + 1] > level
    share = np.cumsum(above[::-1])[::-1] / np.arange(len(above), 0, -1)
    return begin + 1 - len(above) + int(np.argmax(above & (share >= MOSTLY)))


def _with_infinities(losses: ArrayLike) -> Values:
    loss_s = np.asarray(losses, dtype=np.float64)
    return np.where(np.isfinite(loss_s), loss_s, np.inf)
