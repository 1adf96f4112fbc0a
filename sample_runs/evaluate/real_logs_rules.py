"""The rules that are held against each other on logged runs: the package's detectors, and those in use elsewhere."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from diagnostics.detect.alarm import Alarm
from diagnostics.detect.bands import PLAIN, Band, shipped_bands
from diagnostics.detect.block import Block
from diagnostics.detect.detector import Detector
from diagnostics.detect.divergence import Divergence
from diagnostics.detect.history import History
from diagnostics.detect.loss_rise import LossRise
from diagnostics.detect.loss_spike import LossSpike
from diagnostics.detect.loss_stall import NeverLearned

from .machine import Values
from .real_logs_score import Alarms, Log, Rule, at_or_above
from .rules import cusum, sigmas, zclip

ALARMING: tuple[type[Detector], ...] = (LossSpike, LossRise, NeverLearned, Divergence)
"""The detectors whose findings are alarms and which need nothing but the loss."""
EWMA_SHARE = 0.05
EWMA_WINDOW = 128
EWMA_CLIP = 10.0
SPREAD_FLOOR = 1e-3


def block_of(log: Log) -> Block:
    """A log as the detectors are fed it: every point a measured step, no attention."""
    points = np.arange(len(log.losses), dtype=np.int64)
    return Block(
        steps=points,
        every_step=points,
        ends=points + 1,
        losses=log.losses,
        loss_given=np.ones(len(points), dtype=np.bool_),
        scalars={"grad_norm": log.grad_norms},
    )


def findings_of(log: Log, bands: Mapping[str, Band]) -> dict[str, list[int]]:
    """The points at which each alarming detector raised a finding, by kind."""
    window = History().window(block_of(log), {})
    found = {}
    for of_kind in ALARMING:
        raised = of_kind(bands[of_kind.kind]).feed(window)
        found[of_kind.kind] = [point for finding in raised if (point := finding.raised_step) is not None]
    return found


class Own:
    """The package's detectors on logs: as they ship, and with another edge for loss spikes."""

    def __init__(self, logs: Sequence[Log]) -> None:
        bands = shipped_bands()
        self.shipped_edge = bands[LossSpike.kind].of(PLAIN)
        self._findings = {log.name: findings_of(log, bands) for log in logs}
        self._spikes: dict[str, Values] = {}

    def shipped(self, log: Log, *kinds: str) -> Alarms:
        """The points at which they alarm; `kinds`: only these detectors."""
        found = self._findings[log.name]
        return sorted({point for kind in kinds or found for point in found[kind]})

    def at_spike_edge(self, log: Log, edge: float) -> Alarms:
        """With this edge for loss spikes, the others as they ship."""
        if log.name not in self._spikes:
            window = History().window(block_of(log), {})
            self._spikes[log.name] = LossSpike(Band({PLAIN: 1.0})).judge(window).score
        score = self._spikes[log.name] / edge
        alarm = Alarm(needed=LossSpike.needed, calm=LossSpike.calm, refractory=LossSpike.refractory)
        points = np.arange(len(score), dtype=np.int64)
        turns = alarm.run(points, score >= 1.0, score >= LossSpike.stay_share, score >= 0.0)
        others = self.shipped(log, *(kind.kind for kind in ALARMING if kind is not LossSpike))
        return sorted({*others, *(turn.frame for turn in turns if turn.raised)})


BASELINES = (
    Rule("loss, 6 sigma of the last 128 (OLMo-core)", at_or_above(lambda log: sigmas(log.losses)), 6.0),
    Rule(
        "gradient norm, 6 sigma of the last 128 (OLMo-core)",
        at_or_above(lambda log: sigmas(log.grad_norms)),
        6.0,
    ),
    Rule("gradient norm, z > 2.5 (ZClip's trigger)", at_or_above(lambda log: zclip(log.grad_norms)), 2.5),
    Rule("loss CUSUM", at_or_above(lambda log: cusum(log.losses)), 5.0),
    Rule("loss EWMA 0.05", at_or_above(lambda log: ewma(np.log(np.maximum(log.losses, SPREAD_FLOOR))))),
    Rule("gradient norm EWMA 0.05", at_or_above(lambda log: ewma(np.log(np.maximum(log.grad_norms, 1e-8))))),
)


def ewma(values: Values) -> Values:
    """Exponential average (0.05) of robust z against median and MAD of the 128 values before."""
    padded = np.concatenate([np.full(EWMA_WINDOW, np.nan), values])
    past = sliding_window_view(padded, EWMA_WINDOW)[: len(values)]
    middle = np.median(past, axis=1)
    spread = 1.4826 * np.median(np.abs(past - middle[:, None]), axis=1)
    z = np.clip((values - middle) / np.maximum(spread, SPREAD_FLOOR), -EWMA_CLIP, EWMA_CLIP)
    out = np.full(len(values), np.nan)
    average = 0.0
    for point, rise in enumerate(z.tolist()):
        if not np.isnan(rise):
            average += EWMA_SHARE * (rise - average)
            out[point] = average
    return out
