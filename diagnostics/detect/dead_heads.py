"""Dead heads: heads that compute nothing, told as information; a model trains on without them.

Two ways to be dead, neither judged before step 100. Idle: uniform over its keys (at least 0.999 of the largest entropy)
because its logits are nothing (below 0.01 in size; sigma1 of Wq^T Wk where no logits were observed). Stuck: all its
attention on single keys (at most 1e-4 of the largest entropy), and entropy, largest logit and sigma1 equal to the last
bit to those of 50 and of 100 steps before, though batches differ. A head that averages because the task asks for it has
logits, and one that copies has logits that change.
"""

import numpy as np

from diagnostics.detect.block import Bools, Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import in_words, rounded
from diagnostics.detect.window import GROWTH_STEPS, Window

LEAST_AGE = 100
UNIFORM_FRAC = 0.999
NO_LOGIT = 0.01
SINGLE_KEY_FRAC = 1e-4
ADVICE = (
    "nothing to do while the loss improves; dead heads cost compute and can be pruned; if most heads of a layer are "
    "dead, look at weight decay, the scale of the initial Wq and Wk, and whether their parameters reach the optimizer"
)


class DeadHeads(Detector):
    """Information: heads that never attend, or whose attention is stuck."""

    kind = "dead-heads"
    severity = "info"
    status = "healthy"
    over = "heads"
    needed = 3

    def signal(self, window: Window) -> Values:
        idle, stuck = self._idle(window), self._stuck(window)
        known = ~np.isnan(window.now("entropy_frac"))
        return np.where(known & (window.age >= LEAST_AGE)[:, None], (idle | stuck).astype(np.float64), np.nan)

    @staticmethod
    def _idle(window: Window) -> Bools:
        logit, sigma1 = np.abs(window.now("max_logit")), window.now("sigma1")
        with np.errstate(invalid="ignore"):
            nothing = (logit <= NO_LOGIT) | (np.isnan(logit) & (sigma1 <= NO_LOGIT))
            return (window.now("entropy_frac") >= UNIFORM_FRAC) & nothing

    @staticmethod
    def _stuck(window: Window) -> Bools:
        with np.errstate(invalid="ignore"):
            stuck = np.asarray(window.now("entropy_frac") <= SINGLE_KEY_FRAC)
        if not stuck.any():
            return stuck
        for name in ("entropy_frac", "max_logit", "sigma1"):
            now, unmeasured = window.now(name), np.isnan(window.now(name)) & (name == "sigma1")
            for over in (GROWTH_STEPS, 2 * GROWTH_STEPS):
                stuck = stuck & ((now == window.ago(name, over)) | unmeasured)
        return stuck

    def describe(self, window: Window, frame: int, column: int) -> Words:
        idle, dead = self._idle(window)[frame], self.signal(window)[frame] >= 1.0
        layer, head = window.heads[column]
        frac, logit = window.now("entropy_frac")[frame, column], window.now("max_logit")[frame, column]
        evidence = {
            "entropy_frac": rounded(frac),
            "entropy_frac_healthy": f"below {UNIFORM_FRAC}, or with logits"
            if idle[column]
            else "changes with the batch",
            "max_logit": rounded(logit),
            "max_logit_healthy": f"above {NO_LOGIT}" if idle[column] else "changes with the batch",
            "sigma1": rounded(window.now("sigma1")[frame, column]),
            "heads_dead": int(dead.sum()),
            "heads": len(window.heads),
        }
        how = "attends to all keys alike" if idle[column] else "is stuck on single keys whatever the batch"
        message = (
            f"{layer or 'the model'} head {head} {how} (largest logit {in_words(logit)}); "
            f"{int(dead.sum())} of {len(window.heads)} heads do nothing"
        )
        return Words(evidence, message, ADVICE)
