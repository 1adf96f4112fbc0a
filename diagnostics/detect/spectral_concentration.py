"""Spectral energy concentrating while sigma1 runs away: the early sign, before entropy falls and the loss shows it.

Source: arXiv 2505.21910 (fast growth of sigma1(Wq^T Wk) and of SEC is the precursor of malignant collapse).
The level of SEC does not separate: heads of healthy small models reach 0.96, their mean 0.8. The growth of sigma1
does, where the energy is concentrated or concentrates fast and the loss does not clearly fall.

By itself the growth says little in a young run: weights that start small multiply whatever becomes of them. So it
counts no further than the largest logit of the run has grown with it. With QK-norm the weights' spectrum does not bound
the logits: those sites follow their own head's logits, and have a band of their own.
"""

import numpy as np

from diagnostics.detect import exact
from diagnostics.detect.band_words import below, fold
from diagnostics.detect.bands import PLAIN, QK_NORM
from diagnostics.detect.block import Values
from diagnostics.detect.detector import Detector, Words
from diagnostics.detect.finding import in_words, rounded
from diagnostics.detect.growth import burst, burst_steps
from diagnostics.detect.window import GROWTH_STEPS, Window

SIGMA_FLOOR = 0.02
"""A query projection that starts at zero grows without bound at first; below this no logit comes of it."""
RISE_STEPS = 30
FAST_RISE = 0.35
"""Rise of SEC(1) within 30 steps, of the mean over heads or of one head; means of healthy arms stayed below 0.28."""
LOGIT_FLOOR = 1.5
"""sigma1 counts as far as logits follow it, from here on: weights that start small grow a hundredfold unharmed."""
HIGH_MEAN_SEC = 0.6
HIGH_SEC = 0.9
ADVICE = (
    "lower the learning rate or lengthen the warmup; on the live run, `diagnostics control RUN spectral-bound --tau 0.01` "
    "keeps sigma1 from growing faster than 1 % a step"
)
QK_NORM_ADVICE = (
    "queries and keys are normalised here, so that the logits do not follow from it: watch entropy and logits, "
    "`diagnostics watch RUN`, and lower the learning rate if they move"
)


class SpectralConcentration(Detector):
    """Growth of ln sigma1(Wq^T Wk) over 50 steps (warning).

    0 while the loss clearly falls, and where spectral energy is neither concentrated nor concentrating: the mean
    SEC(1) over heads is below 0.6 and rose by less than 0.35 within 30 steps, and so did not the head's own either.
    """

    kind = "spectral-concentration"
    over = "heads"

    def signal(self, window: Window) -> Values:
        growth = burst(window, "sigma1", SIGMA_FLOOR)
        sec = window.now("sec_1")
        rise = _rise(window)
        with np.errstate(invalid="ignore"):
            of_all = (exact.mean(sec) >= HIGH_MEAN_SEC) | (exact.mean(rise) >= FAST_RISE)
            # Before 50 steps have passed all heads of a small model move so, and the loss cannot yet say that it falls.
            early = ~np.isnan(window.loss.median) & np.isnan(window.loss.change)
            of_one = (sec >= HIGH_SEC) & (rise >= FAST_RISE) & ~early[:, None]
        concentrated = (of_all[:, None] | of_one) & ~window.loss.falling[:, None]
        growth = np.where(np.isnan(growth), np.nan, np.fmin(growth, _followed(window)))
        counted = np.where(concentrated, np.maximum(growth, 0.0), 0.0)
        return np.where(np.isnan(growth) | np.isnan(sec), np.nan, counted)

    def describe(self, window: Window, frame: int, column: int) -> Words:
        layer, number = window.heads[column]
        growth = float(burst(window, "sigma1", SIGMA_FLOOR)[frame, column])
        mean_sec = float(exact.mean(window.now("sec_1"))[frame])
        rises = _rise(window)
        rise = float(exact.mean(rises)[frame])
        steps = burst_steps(window, frame)
        normed = bool(window.flag(QK_NORM)[column])
        evidence = {
            "sigma1": rounded(float(window.now("sigma1")[frame, column])),
            "sigma1_growth": rounded(float(np.exp(growth))),
            "sigma1_growth_healthy": below(
                self.band, self.band.of(QK_NORM if normed else PLAIN), fold(GROWTH_STEPS)
            ),
            "sigma1_growth_steps": steps,
            "sec_1": rounded(float(window.now("sec_1")[frame, column])),
            "sec_1_rise": rounded(float(rises[frame, column])),
            "mean_sec_1": rounded(mean_sec),
            "mean_sec_1_healthy": f"below {HIGH_MEAN_SEC} while sigma1 grows this fast",
            "mean_sec_1_rise": rounded(rise),
            "rise_steps": min(RISE_STEPS, int(window.age[frame])),
            "mean_sec_1_rise_healthy": f"below {FAST_RISE} in {RISE_STEPS} steps",
            "mean_entropy_frac": rounded(float(exact.mean(window.now("entropy_frac"))[frame])),
        }
        message = (
            f"spectral energy is concentrating fast: sigma1 of Wq^T Wk grew {np.exp(growth):.1f}-fold in {steps} steps in "
            f"{layer or 'the model'} head {number}, mean SEC rose by {in_words(rise)} to {in_words(mean_sec)}"
        )
        return Words(evidence, message, QK_NORM_ADVICE if normed else ADVICE)


def _followed(window: Window) -> Values:
    """(F, H) growth of the logits: the largest of the run, with QK-norm the head's own; NaN where none was observed."""
    own = np.maximum(burst(window, "max_logit", LOGIT_FLOOR), 0.0)
    return np.where(window.flag(QK_NORM), own, exact.largest(own)[:, None])


def _rise(window: Window) -> Values:
    """(F, H) rise of SEC(1) within 30 steps, or since the last frame where that is longer ago."""
    return np.asarray(window.now("sec_1") - window.ago("sec_1", RISE_STEPS))
