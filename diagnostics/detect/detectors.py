"""All detectors, in the order in which they look: a later one may read the scores of those before."""

from diagnostics.detect.benign_collapse import BenignCollapse
from diagnostics.detect.dead_heads import DeadHeads
from diagnostics.detect.detector import Detector
from diagnostics.detect.divergence import Divergence
from diagnostics.detect.entropy_collapse import EntropyCollapse
from diagnostics.detect.fast_concentration import FastConcentration
from diagnostics.detect.learning_rate import LearningRateJump
from diagnostics.detect.logit_growth import LogitGrowth
from diagnostics.detect.loss_rise import LossRise
from diagnostics.detect.loss_spike import LossSpike
from diagnostics.detect.loss_stall import LossStall, NeverLearned
from diagnostics.detect.not_attention import NotAttention
from diagnostics.detect.rank_collapse import RankCollapse
from diagnostics.detect.saturated_attention import SaturatedAttention
from diagnostics.detect.second_moment import StaleSecondMoment
from diagnostics.detect.spectral_concentration import SpectralConcentration
from diagnostics.detect.update_spike import UpdateSpike

_ALL: tuple[type[Detector], ...] = (
    EntropyCollapse,
    SpectralConcentration,
    LogitGrowth,
    RankCollapse,
    SaturatedAttention,
    FastConcentration,
    BenignCollapse,
    DeadHeads,
    UpdateSpike,
    StaleSecondMoment,
    LearningRateJump,
    LossSpike,
    LossRise,
    LossStall,
    NeverLearned,
    Divergence,
    NotAttention,
)

DETECTORS: dict[str, type[Detector]] = {detector.kind: detector for detector in _ALL}
"""By kind. A new pathology is one file, one line here and one band in bands.json."""
