"""Entropy collapse: heads that look at almost nothing, told apart by whether the model dies of it.

Malignant (arXiv 2505.21910): the attention map is sparse AND of low rank, with the spectral energy of
Wq^T Wk in few directions and the logits running away. Benign: sparse but of high rank (near the identity or
another permutation); attention is then close to a linear map, and training goes on.

The papers give no threshold; all numbers here are ours, from small GPTs (the demonstration's arms: its
failing run passes them by step 60, its healthy ones stay below for all 300 steps). Entropy levels alone cry
wolf: heads of healthy runs become sharp because the task asks for it. So an alarm needs growth as well.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.detect.alarm import Alarm
from diagnostics.detect.finding import Finding, FindingLog, in_words, rounded
from diagnostics.detect.frame import Frame, Values
from diagnostics.detect.heads import HeadHistory

WINDOW_STEPS = 50
WINDOW_SHARE = 0.25
RUNAWAY_LOGIT = 20.0
"""exp(20): one key outweighs all others of any context; healthy arms reach it late and slowly."""
RUNAWAY_GROWTH = 2.0
"""Growth of ln(max logit) within the window; healthy heads above RUNAWAY_LOGIT stayed below 1.3."""
SHARP_FRAC = 0.5
COLLAPSED_FRAC = 0.3
LOW_RANK_FRAC = 0.35
"""Uniform causal attention has 0.33 to 0.5, a map near the identity 1."""
HIGH_RANK_FRAC = 0.6
CONCENTRATED_SEC = 0.9
COLLAPSED_SHARE = 0.5
"""A share of collapsed heads that no healthy arm comes near (at most 0.06): slow collapse is judged by it."""
STILL_GROWING = 1.1
FLAT_LOSS = 0.01
STAYS_SHARE = 0.06
ADVICE = (
    "arm the spectral bound, `diagnostics control RUN spectral-bound --tau 0.01`; if the loss does not follow within "
    "some hundred steps, restart from a checkpoint before the first step named here with the bound armed from the start, "
    "a warmup or a lower learning rate"
)


class EntropyCollapse:
    """Malignant collapse (critical) and benign collapse (info) of attention entropy."""

    def __init__(self) -> None:
        self._history = HeadHistory(least_steps=WINDOW_STEPS, share=WINDOW_SHARE)
        self._losses: deque[tuple[int, float]] = deque()
        self._culprits: set[tuple[str, int]] = set()
        self._malignant = Alarm(needed=2)
        self._benign = Alarm(needed=3)
        self._log = FindingLog()

    def feed(self, frame: Frame) -> list[Finding]:
        finite = frame.losses[frame.loss_given & np.isfinite(frame.losses)]
        if len(finite):
            self._losses.append((frame.step, float(np.median(finite))))
        window = max(WINDOW_STEPS, int(frame.step * WINDOW_SHARE))
        while self._losses and self._losses[0][0] < frame.step - window:
            self._losses.popleft()
        if not self._history.add(frame):
            return []
        # An unmeasured quantity is NaN, and every comparison with it is False: nothing is concluded from it.
        with np.errstate(invalid="ignore"):
            return [*self._feed_malignant(frame), *self._feed_benign(frame)]

    def _feed_malignant(self, frame: Frame) -> list[Finding]:
        now, first = self._history.now, self._history.first
        frac, logit, sec = now("entropy_frac"), now("max_logit"), now("sec_1")
        low_rank = now("rank_frac") <= LOW_RANK_FRAC
        # Logits below 1 do not shape attention: growth is counted from there.
        growth = np.log(np.maximum(logit, 1.0)) - np.log(np.maximum(first("max_logit"), 1.0))
        runaway = (
            (logit >= RUNAWAY_LOGIT)
            & (growth >= RUNAWAY_GROWTH)
            & ((sec >= CONCENTRATED_SEC) | np.isnan(sec))
        )
        unseen = np.isnan(frac)
        dying = runaway & (
            (frac <= SHARP_FRAC) & (low_rank | np.isnan(now("rank_frac")))
            | unseen & (sec >= CONCENTRATED_SEC)
        )
        collapsed = (frac <= COLLAPSED_FRAC) & low_rank & (logit >= RUNAWAY_LOGIT)
        share = float(np.mean(collapsed))
        concentrated = not bool((sec[collapsed] < CONCENTRATED_SEC).any()) if collapsed.any() else False
        # Slow collapse has no runaway; most heads are gone all the same, and either grow on or hold the loss.
        growing = bool(collapsed.any()) and float(np.nanmedian(growth[collapsed])) >= np.log(STILL_GROWING)
        slow = share >= COLLAPSED_SHARE and concentrated and (growing or self._loss_is_flat())
        dying = dying | collapsed if slow else dying
        # In a large model the heads that raised the alarm may be few: it stays as long as one of them is gone.
        still = any(
            gone and key in self._culprits for key, gone in zip(self._history.keys, collapsed, strict=True)
        )
        stay = still or share >= STAYS_SHARE
        raised = self._malignant.see(frame.step, start=bool(dying.any()), stay=stay)
        if self._malignant.just_cleared:
            self._log.end("entropy-collapse", frame.step)
        if not raised:
            return []
        self._culprits = {key for key, is_dying in zip(self._history.keys, dying, strict=True) if is_dying}
        worst = _worst(frac, logit, dying)
        layer, head = self._history.keys[worst]
        evidence = {
            "entropy": rounded(now("entropy")[worst]),
            "entropy_frac": rounded(frac[worst]),
            "entropy_frac_healthy": f"above {SHARP_FRAC} while logits grow this fast",
            "rank_frac": rounded(now("rank_frac")[worst]),
            "max_logit": rounded(logit[worst]),
            "max_logit_growth": rounded(np.exp(growth[worst])),
            "max_logit_growth_steps": self._history.span,
            "max_logit_growth_healthy": f"below {np.exp(RUNAWAY_GROWTH):.1f} times above a logit of {RUNAWAY_LOGIT:g}",
            "sec_1": rounded(sec[worst]),
            "sigma1": rounded(now("sigma1")[worst]),
            "heads_dying": int(dying.sum()),
            "heads": len(self._history.keys),
        }
        message = (
            f"attention entropy is collapsing in {layer or 'the model'} head {head}: {in_words(now('entropy')[worst])} nats, "
            f"low-rank map, largest logit {in_words(logit[worst])} after {np.exp(growth[worst]):.1f}-fold growth in "
            f"{self._history.span} steps, SEC {in_words(sec[worst])}"
        )
        return self._log.add(
            Finding(
                "entropy-collapse", "critical", layer, head, self._malignant.onset or 0, evidence, ADVICE, message,
                status="collapsed", raised_step=frame.step,
            )
        )  # fmt: skip

    def _loss_is_flat(self) -> bool:
        """Whether the loss has fallen by less than `FLAT_LOSS` of itself over the window."""
        if len(self._losses) < 2:  # noqa: PLR2004 - two ends
            return False
        first, last = self._losses[0][1], self._losses[-1][1]
        return first - last < FLAT_LOSS * abs(first)

    def _feed_benign(self, frame: Frame) -> list[Finding]:
        frac, rank = self._history.now("entropy_frac"), self._history.now("rank_frac")
        sharp = (frac <= COLLAPSED_FRAC) & (rank >= HIGH_RANK_FRAC)
        raised = self._benign.see(frame.step, start=bool(sharp.any()))
        if self._benign.just_cleared:
            self._log.end("benign-entropy-collapse", frame.step)
        if not raised:
            return []
        worst = _worst(frac, rank, sharp)
        layer, head = self._history.keys[worst]
        evidence = {
            "entropy": rounded(self._history.now("entropy")[worst]),
            "entropy_frac": rounded(frac[worst]),
            "rank_frac": rounded(rank[worst]),
            "heads_sharp": int(sharp.sum()),
            "heads": len(self._history.keys),
        }
        message = (
            f"{layer or 'the model'} head {head} attends to single keys ({in_words(frac[worst])} of the largest entropy) with a "
            f"map of high rank ({in_words(rank[worst])} of its rows): sharp, but not collapsing"
        )
        advice = "nothing to do while the loss improves; such heads copy or shift tokens"
        return self._log.add(
            Finding(
                "benign-entropy-collapse", "info", layer, head, self._benign.onset or 0, evidence, advice, message,
                status="healthy", raised_step=frame.step,
            )
        )  # fmt: skip

    def findings(self) -> list[Finding]:
        return list(self._log)

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": self._history.state_dict(),
            "losses": list(self._losses),
            "culprits": sorted(self._culprits),
            "malignant": self._malignant.state_dict(),
            "benign": self._benign.state_dict(),
            "findings": self._log.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._history.load_state_dict(state["history"])
        self._culprits = {(str(layer), int(head)) for layer, head in state["culprits"]}
        self._losses = deque((int(step), float(loss)) for step, loss in state["losses"])
        self._malignant.load_state_dict(state["malignant"])
        self._benign.load_state_dict(state["benign"])
        self._log.load_state_dict(state["findings"])


def _worst(frac: Values, tie: Values, among: NDArray[np.bool_]) -> int:
    """Index of the lowest entropy among the heads named; where it was not measured, of the largest `tie`."""
    candidates = np.flatnonzero(among)
    order = np.lexsort((-tie[candidates], np.nan_to_num(frac[candidates], nan=2.0)))
    return int(candidates[order[0]])
