"""Malignant entropy collapse: heads that look at almost nothing, and of which the model dies.

Malignant (arXiv 2505.21910): the attention map is sparse AND of low rank, with the spectral energy of
Wq^T Wk in few directions and the logits running away. Sparse maps of high rank are benign (`benign_collapse.py`).

The papers give no threshold; all numbers here are ours. Entropy levels alone cry wolf: heads of healthy runs
become sharp because the task asks for it, and heads that rest on a first token are sharp and of low rank for a
whole run. So an alarm needs growth as well. A falling loss does not mute it: the loss follows later.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from diagnostics.detect import exact
from diagnostics.detect.band_words import below, fold
from diagnostics.detect.bands import PLAIN, QK_NORM, Band
from diagnostics.detect.block import Bools, Key, Values
from diagnostics.detect.detector import Detector, Judged, Words
from diagnostics.detect.finding import Finding, in_words, rounded
from diagnostics.detect.growth import burst, burst_steps
from diagnostics.detect.loss_course import FALL_SHARE, FALL_SPREADS
from diagnostics.detect.window import GROWTH_STEPS, Window

LOGIT_FLOOR = 1.0
"""Logits below 1 do not shape attention: growth is counted from there."""
RUNAWAY_LOGIT = 20.0
"""exp(20): one key outweighs all others of any context; healthy arms reach it late and slowly."""
RUNAWAY_GROWTH = 2.0
"""Nats within 50 steps that make a signal of 1; healthy heads above RUNAWAY_LOGIT stayed below 1.3."""
LONG_STEPS = 200
LONG_GROWTH = 4.0
"""Nats within 200 steps that make a signal of 1 while the loss does not fall, if 50 steps still see their quarter."""
SHARP_FRAC = 0.5
COLLAPSED_FRAC = 0.3
"""Asked for while the loss falls: heads on their way to a use in the model pass through the range above it."""
LOW_RANK_FRAC = 0.35
"""Uniform causal attention has 0.33 to 0.5, a map near the identity 1."""
HEALED_RANK_FRAC = 0.6
CONCENTRATED_SEC = 0.9
COLLAPSED_SHARE = 0.5
"""A share of heads collapsed within 200 steps that no healthy arm comes near (at most 0.06)."""
LATELY_GROWN = float(np.log(2.0))
"""Nats within those steps: heads that were sharp from the start did not collapse."""
STILL_GROWING = float(np.log(1.1))

ADVICE = (
    "arm the spectral bound, `diagnostics control RUN spectral-bound --tau 0.01`; if the loss does not follow within "
    "some hundred steps, restart from a checkpoint before the first step named here with the bound armed from the start, "
    "a warmup or a lower learning rate"
)
QK_NORM_ADVICE = (
    "queries and keys are normalised here, so that the logits grow through the gains of that norm, which a bound on the "
    "weights does not hold: restart from a checkpoint before the first step named here with a warmup, a lower learning "
    "rate or weight decay on those gains"
)


class Columns(NamedTuple):
    """(F, H) of what is known of each head."""

    frac: Values
    rank: Values
    logit: Values
    sec: Values


class EntropyCollapse(Detector):
    """Sharp heads of low rank whose logits ran away, or most heads of the model gone slowly (critical).

    The signal is the growth of ln(max logit) over 50 steps in units of 2 nats, or half that pace kept up for 200
    steps while the loss does not fall; 0 where the head is not sharp, not of low rank, not concentrated or its logits still small.
    For a slow collapse it is the share of collapsed heads in units of a half. Where entropy was not observed,
    concentration and logits stand for it.
    """

    kind = "entropy-collapse"
    severity = "critical"
    status = "collapsed"
    over = "heads"

    def __init__(self, band: Band) -> None:
        super().__init__(band)
        self._gone: frozenset[Key] = frozenset()
        self._gone_after: frozenset[Key] = frozenset()

    def signal(self, window: Window) -> Values:
        head = _columns(window)
        unseen = np.isnan(head.frac)
        growth = burst(window, "max_logit", LOGIT_FLOOR)
        judged = ~np.isnan(growth) & ~(unseen & np.isnan(head.sec))
        sharp = np.where(window.loss.falling, COLLAPSED_FRAC, SHARP_FRAC)[:, None]
        with np.errstate(invalid="ignore"):
            shape = (
                (unseen | (head.frac <= sharp))
                & ((head.rank <= LOW_RANK_FRAC) | np.isnan(head.rank))
                & ((head.sec >= CONCENTRATED_SEC) | np.isnan(head.sec))
                & (head.logit >= RUNAWAY_LOGIT)
            )
        if not shape.any():
            return np.where(judged, 0.0, np.nan)
        pace = np.maximum(growth, 0.0) / RUNAWAY_GROWTH
        kept_up = np.where(_loss_falls(window)[:, None], 0.0, _kept_up(window, growth))
        alone = np.where(shape, np.fmax(pace, kept_up), 0.0)
        return np.where(judged, np.maximum(alone, _slow(window, head, growth)), np.nan)

    def judge(self, window: Window) -> Judged:
        """As the base does; and an alarm stays while a head that died is not healed, however slowly it grows now."""
        judged = super().judge(window)
        if not window.heads or not (self._gone or (judged.score >= 1.0).any()):
            self._gone_after = self._gone
            return judged
        gone = self._latched(window)
        self._gone_after = frozenset(
            key for key, is_gone in zip(window.heads, gone[-1], strict=True) if is_gone
        )
        return judged._replace(stay=judged.stay | gone.any(axis=1))

    def feed(self, window: Window) -> list[Finding]:
        raised = super().feed(window)
        self._gone = self._gone_after
        return raised

    def _latched(self, window: Window) -> Bools:
        """(F, H) whether a head was dying at this frame or before it and is not healed since."""
        head = _columns(window)
        with np.errstate(invalid="ignore"):
            dying = self.signal(window) / self.edges(window) >= 1.0
            # What is not measured is not healed.
            healed = (
                (head.frac > SHARP_FRAC) | (head.rank > HEALED_RANK_FRAC) | (head.logit < RUNAWAY_LOGIT / 2)
            )
        frame = np.arange(1, len(window) + 1)[:, None]
        before = np.array([key in self._gone for key in window.heads])
        set_at = np.maximum.accumulate(np.where(dying, frame, np.where(before, 0, -1)), axis=0)
        reset_at = np.maximum.accumulate(np.where(healed & ~dying, frame, -1), axis=0)
        return set_at > reset_at

    def describe(self, window: Window, frame: int, column: int) -> Words:
        layer, number = window.heads[column]
        at = {name: float(window.now(name)[frame, column]) for name in (*_NAMES, "entropy", "sigma1")}
        growth, steps = _telling_growth(window, frame, column)
        dying = int((self.signal(window)[frame] / self.edges(window) >= 1.0).sum())
        known = int((~np.isnan(window.now("max_logit")[frame])).sum())
        normed = bool(window.flag(QK_NORM)[column])
        edge = self.band.of(QK_NORM if normed else PLAIN)
        evidence = {
            "entropy": rounded(at["entropy"]),
            "entropy_frac": rounded(at["entropy_frac"]),
            "entropy_frac_healthy": f"above {SHARP_FRAC} while logits grow this fast",
            "rank_frac": rounded(at["rank_frac"]),
            "rank_frac_healthy": f"above {LOW_RANK_FRAC} while attention is sharp",
            "max_logit": rounded(at["max_logit"]),
            "max_logit_growth": rounded(float(np.exp(growth))),
            "max_logit_growth_steps": steps,
            "max_logit_growth_healthy": below(
                self.band, edge, lambda units: fold(GROWTH_STEPS)(RUNAWAY_GROWTH * units)
            )
            + f" above a logit of {RUNAWAY_LOGIT:g}",
            "sec_1": rounded(at["sec_1"]),
            "sigma1": rounded(at["sigma1"]),
            "heads_dying": dying,
            "heads_dying_healthy": f"less than {COLLAPSED_SHARE:.0%} of {known} heads collapsing slowly, none in a runaway",
            "heads": known,
        }
        entropy = (
            "entropy not observed"
            if np.isnan(at["entropy"])
            else f"{in_words(at['entropy'])} nats, low-rank map"
        )
        message = (
            f"attention entropy is collapsing in {layer or 'the model'} head {number}: {entropy}, "
            f"largest logit {in_words(at['max_logit'])} after {np.exp(growth):.1f}-fold growth in {steps} steps, "
            f"SEC {in_words(at['sec_1'])}; {dying} of {known} heads {'is' if dying == 1 else 'are'} dying"
        )
        return Words(evidence, message, QK_NORM_ADVICE if normed else ADVICE)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "gone": [list(key) for key in sorted(self._gone)]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._gone = frozenset((str(layer), int(head)) for layer, head in state["gone"])


def _loss_falls(window: Window) -> Bools:
    """(F,) whether the loss clearly falls, within 50 steps or within the 200 that a slow collapse takes."""
    loss = window.loss
    before = window.ago("loss_median", LONG_STEPS)[:, 0]
    with np.errstate(invalid="ignore"):
        fall = before - loss.median
        since_long = (fall > FALL_SHARE * np.abs(before)) & (fall > FALL_SPREADS * loss.spread)
    return loss.falling | since_long


def _long(window: Window) -> Values:
    return window.growth("max_logit", LOGIT_FLOOR, LONG_STEPS)


def _kept_up(window: Window, growth: Values) -> Values:
    """Growth over 200 steps in units of `LONG_GROWTH`, no more than the newest 50 steps go on with."""
    return np.minimum(_long(window), growth * (LONG_STEPS / GROWTH_STEPS)) / LONG_GROWTH


def _telling_growth(window: Window, frame: int, column: int) -> tuple[float, int]:
    """Growth in nats and the steps it was taken over: of the two that are looked at the one that says more."""
    fast = float(burst(window, "max_logit", LOGIT_FLOOR)[frame, column])
    long = float(_long(window)[frame, column])
    if np.isnan(long) or fast >= RUNAWAY_GROWTH or fast / RUNAWAY_GROWTH >= long / LONG_GROWTH:
        return fast, burst_steps(window, frame)
    return long, min(LONG_STEPS, int(window.age[frame]))


_NAMES = ("entropy_frac", "rank_frac", "max_logit", "sec_1")


def _columns(window: Window) -> Columns:
    """With QK-norm the weights' spectrum does not bound the logits: it is left out there."""
    frac, rank, logit, sec = (window.now(name) for name in _NAMES)
    normed = window.flag(QK_NORM)
    return Columns(frac, rank, logit, np.where(normed, np.nan, sec) if normed.any() else sec)


def _slow(window: Window, head: Columns, growth: Values) -> Values:
    """(F, H): for every collapsed head the share of heads that collapsed lately, in units of a half; else 0.

    No head runs away, but most are gone and their logits still grow. A loss that falls says that the task asks for it.
    """
    nothing = np.zeros(head.logit.shape)
    with np.errstate(invalid="ignore"):
        collapsed = (
            (head.frac <= COLLAPSED_FRAC) & (head.rank <= LOW_RANK_FRAC) & (head.logit >= RUNAWAY_LOGIT)
        )
        if not collapsed.any():
            return nothing
        lately = collapsed & (_long(window) >= LATELY_GROWN)
        spread_out = (lately & (head.sec < CONCENTRATED_SEC)).any(axis=1)
    known = (~np.isnan(head.logit)).sum(axis=1)
    share = lately.sum(axis=1) / np.maximum(known, 1)
    growing = exact.median(np.where(lately, growth, np.nan)) >= STILL_GROWING
    is_slow = ~spread_out & growing & ~_loss_falls(window) & (share >= COLLAPSED_SHARE / 2)
    return np.where(lately & is_slow[:, None], (share / COLLAPSED_SHARE)[:, None], nothing)
