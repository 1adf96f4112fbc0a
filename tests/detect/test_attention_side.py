"""Entropy collapse, its benign twin, spectral concentration, logit growth, rank collapse: each beside its healthy look-alike."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from blocks import HEADS, block_of, in_parts

from diagnostics.detect.band_words import below, fold
from diagnostics.detect.bands import Band
from diagnostics.detect.benign_collapse import BenignCollapse
from diagnostics.detect.block import Block, Key
from diagnostics.detect.detector import Detector
from diagnostics.detect.entropy_collapse import EntropyCollapse
from diagnostics.detect.finding import Finding
from diagnostics.detect.history import History, flags_of
from diagnostics.detect.logit_growth import LogitGrowth
from diagnostics.detect.rank_collapse import RankCollapse
from diagnostics.detect.spectral_concentration import SpectralConcentration

Course = Callable[[int], Mapping[str, Any]]
BANDS: dict[type[Detector], Band] = {
    EntropyCollapse: Band({"plain": 1.0}),
    SpectralConcentration: Band({"plain": 1.5, "qk_norm": 3.0}),
    LogitGrowth: Band({"plain": 2.0}),
    RankCollapse: Band({"plain": 0.8}),
    BenignCollapse: Band({"plain": 0.6}),
}
"""Round ones of our own, so that these tests hold whatever the corpus says of the shipped ones."""
BIG = tuple((f"blocks.{layer:02}.attn", head) for layer in range(12) for head in range(12))
WORST = 77
QK_NORM = [{"name": layer, "flags": ["qk_norm"]} for layer, _ in HEADS]


class Five:
    """The five detectors over one run."""

    def __init__(self, sites: list[dict[str, Any]] | None = None) -> None:
        self.history = History()
        self.flags = flags_of(sites or [])
        self.detectors = [detector(band) for detector, band in BANDS.items()]
        self.raised: list[Finding] = []
        self.scores: list[dict[str, Any]] = []

    def feed(self, blocks: list[Block]) -> "Five":
        for block in blocks:
            window = self.history.window(block, self.flags)
            for detector in self.detectors:
                self.raised += detector.feed(window)
            self.scores.append(dict(window.scores))
        return self

    def resumed(self) -> "Five":
        """Another that goes on from the saved state, by way of JSON."""
        other = Five()
        other.flags, other.raised, other.scores = self.flags, self.raised, self.scores
        other.history.load_state_dict(json.loads(json.dumps(self.history.state_dict())))
        for mine, its in zip(self.detectors, other.detectors, strict=True):
            its.load_state_dict(json.loads(json.dumps(mine.state_dict())))
        return other

    def findings(self) -> list[Finding]:
        return [finding for detector in self.detectors for finding in detector.findings()]

    def all_scores(self) -> dict[str, list[float]]:
        return {
            kind: [float(score) for scores in self.scores for score in scores[kind]]
            for kind in (self.scores[0] if self.scores else {})
        }


def judged(
    course: Course,
    steps: int = 400,
    *,
    every: int = 10,
    heads: tuple[Key, ...] = HEADS,
    sites: list[dict[str, Any]] | None = None,
) -> list[Finding]:
    return Five(sites).feed([block_of(course, steps, every=every, heads=heads)]).findings()


def kinds(findings: list[Finding]) -> list[str]:
    return [finding.kind for finding in findings]


def ramp(step: int, first: int, last: int) -> float:
    return min(1.0, max(0.0, (step - first) / (last - first)))


def falling(step: int) -> float:
    """By a tenth in 50 steps, for ever."""
    return float(5.0 * 0.9 ** (step / 50))


def flat(step: int) -> float:
    return 2.0 + 0.01 * float(np.sin(step))


def calm(step: int, loss: Callable[[int], float] = flat) -> dict[str, Any]:
    """Heads that do nothing remarkable."""
    return {
        "loss": loss(step), "entropy": 3.0, "entropy_frac": 0.8, "rank_frac": 0.4, "max_logit": 4.0, "sec_1": 0.3,
        "sigma1": 1.0,
    }  # fmt: skip


def in_one(course: Mapping[str, Any], heads: tuple[Key, ...], head: int, **values: float) -> dict[str, Any]:
    """The course with other values in one head."""
    told = dict(course)
    for name, value in values.items():
        column = np.broadcast_to(np.asarray(told[name], float), (len(heads),)).copy()
        column[head] = value
        told[name] = column
    return told


def dying(done: float, top: float = 80.0) -> dict[str, float]:
    """The values of a head that has come so far on its way to a collapse."""
    return {
        "entropy": 3.0 - 2.8 * done, "entropy_frac": 0.8 - 0.75 * done, "rank_frac": 0.4 - 0.35 * done,
        "max_logit": top**done, "sec_1": 0.5 + 0.49 * done, "sigma1": 20**done,
    }  # fmt: skip


def one_dies(step: int) -> dict[str, Any]:
    """One head of 144 goes between steps 100 and 150; the loss, which falls, knows nothing of it."""
    return in_one(calm(step, falling), BIG, WORST, **dying(ramp(step, 100, 150)))


def without(course: Course, *names: str) -> Course:
    return lambda step: {name: value for name, value in course(step).items() if name not in names}


@pytest.mark.parametrize("every", [1, 5, 10, 25, 50])
def test_one_dying_head_of_144_is_found_and_named_at_any_schedule(every: int) -> None:
    (finding,) = judged(one_dies, every=every, heads=BIG)
    assert (finding.kind, finding.severity, finding.status) == ("entropy-collapse", "critical", "collapsed")
    assert (finding.layer, finding.head) == BIG[WORST]
    assert 130 <= finding.first_step <= 150
    assert finding.raised_step is not None
    assert finding.raised_step <= 150 + every
    assert finding.active
    assert (finding.evidence["heads_dying"], finding.evidence["heads"]) == (1, 144)
    assert finding.evidence["max_logit_growth"] > np.exp(2)
    assert "diagnostics control RUN spectral-bound --tau 0.01" in finding.advice


@pytest.mark.parametrize(
    "unknown", [("entropy", "entropy_frac", "rank_frac"), ("rank_frac",), ("sec_1", "sigma1")]
)
def test_what_was_not_measured_is_left_out_of_the_judgement_and_out_of_the_numbers(
    unknown: tuple[str, ...],
) -> None:
    (finding,) = judged(without(one_dies, *unknown), heads=BIG)
    assert (finding.kind, finding.head) == ("entropy-collapse", BIG[WORST][1])
    assert all(finding.evidence[name] is None for name in unknown)


def test_nothing_is_concluded_from_logits_alone() -> None:
    course = without(one_dies, "entropy", "entropy_frac", "rank_frac", "sec_1", "sigma1")
    assert judged(course, heads=BIG) == []


def test_a_collapse_within_a_run_of_60_steps_is_found() -> None:
    def short(step: int) -> dict[str, Any]:
        return in_one(calm(step), HEADS, 2, **dying(ramp(step, 5, 40)))

    assert "entropy-collapse" in kinds(judged(short, 60, every=5))


@pytest.mark.parametrize("loss", [flat, falling])
def test_sink_heads_that_were_sharp_from_the_start_are_none(loss: Callable[[int], float]) -> None:
    """As in trained models: three quarters of the heads rest on the first token, with logits as large as they come."""

    def sinks(step: int) -> dict[str, Any]:
        told = calm(step, loss)
        for head in range(6):
            values = {"entropy_frac": 0.03, "rank_frac": 0.05, "max_logit": 300.0 + step % 7, "sec_1": 0.99}
            told = in_one(told, HEADS, head, **values)
        return told

    assert judged(sinks, 600) == []


def test_sink_heads_whose_logits_drift_are_none() -> None:
    """By half in 200 steps: they were what they are when the run began."""

    def drifting(step: int) -> dict[str, Any]:
        values = {
            "entropy_frac": 0.03,
            "rank_frac": 0.05,
            "max_logit": 40.0 * 1.5 ** (step / 200),
            "sec_1": 0.99,
        }
        return calm(step) | values

    assert judged(drifting, 600) == []


def test_heads_that_sharpened_under_a_falling_loss_are_none_when_it_levels_off() -> None:
    def levelled(step: int) -> dict[str, Any]:
        told = calm(step) | dying(ramp(step, 0, 250))
        return told | {"loss": falling(min(step, 250))}

    assert judged(levelled, 600) == []


def test_sink_heads_that_formed_under_a_noisy_loss_are_none_after_it_levels_off() -> None:
    """The noise hides that the loss still falls, but no logit grows any more."""

    def formed(step: int) -> dict[str, Any]:
        noise = float(np.random.default_rng(step).normal(0, 0.15))
        told = calm(step) | {"loss": 2.2 + 3.5 * np.exp(-step / 60) + 0.3 * np.exp(-step / 800) + noise}
        for head in range(5):
            told = in_one(told, HEADS, head, **dying(ramp(step, 50, 350), 60.0))
        return told

    assert judged(formed, 600, every=1) == []


def sharpening(step: int) -> dict[str, Any]:
    """All heads, from nothing to logits of 100 within 500 steps."""
    done = ramp(step, 0, 500)
    return calm(step, falling) | dying(done, 100.0)


def test_heads_that_all_sharpen_slowly_while_the_loss_falls_are_none() -> None:
    assert judged(sharpening, 600) == []


def test_while_the_loss_falls_a_head_must_be_gone_to_be_dying() -> None:
    """Halfway there it may be on its way to a use, as in a model that learns to look things up."""

    def halfway(loss: Callable[[int], float], frac: float) -> Course:
        def course(step: int) -> dict[str, Any]:
            done = ramp(step, 100, 150)
            values = dying(done) | {"entropy_frac": 0.8 - (0.8 - frac) * done}
            return in_one(calm(step, loss), HEADS, 4, **values)

        return course

    assert judged(halfway(falling, 0.4)) == []
    assert "entropy-collapse" in kinds(judged(halfway(flat, 0.4)))
    assert kinds(judged(halfway(falling, 0.1))) == ["entropy-collapse"]


@pytest.mark.parametrize("known", [True, False])
def test_most_heads_sinking_slowly_under_a_loss_that_stands_are_a_collapse(*, known: bool) -> None:
    def sinking(step: int) -> dict[str, Any]:
        """As linear as can be: nowhere a runaway."""
        done = ramp(step, 100, 400)
        return calm(step) | {
            "entropy_frac": 0.9 - 0.85 * done, "rank_frac": 0.5 - 0.45 * done, "max_logit": 20.0 + 140 * done,
            "sec_1": 0.6 + 0.4 * done,
        }  # fmt: skip

    (finding,) = judged(sinking if known else without(sinking, "loss"), 500)
    assert (finding.kind, finding.evidence["heads_dying"]) == ("entropy-collapse", len(HEADS))
    assert finding.active


def test_one_head_at_half_the_pace_counts_if_it_keeps_it_up_and_the_loss_stands() -> None:
    """One nat and a fifth in 50 steps, for 250 steps."""

    def creeping(loss: Callable[[int], float]) -> Course:
        return lambda step: in_one(
            calm(step, loss), BIG, WORST, **dying(ramp(step, 100, 350), float(np.exp(6)))
        )

    (finding,) = judged(creeping(flat), heads=BIG)
    assert (finding.kind, finding.head) == ("entropy-collapse", BIG[WORST][1])
    assert 100 < finding.evidence["max_logit_growth_steps"] <= 200
    assert judged(creeping(falling), heads=BIG) == []


@pytest.mark.parametrize(
    ("healed", "values"),
    [(True, dying(0.0)), (True, dying(1.0) | {"rank_frac": 0.9}), (False, dying(0.97))],
)
def test_the_alarm_stays_until_the_head_that_raised_it_is_healed(
    *, healed: bool, values: dict[str, float]
) -> None:
    def course(step: int) -> dict[str, Any]:
        return one_dies(step) if step < 300 else in_one(calm(step, falling), BIG, WORST, **values)

    (finding,) = [f for f in judged(course, 800, heads=BIG) if f.kind == "entropy-collapse"]
    assert finding.last_step == (320 if healed else None)


def test_heads_that_appear_later_are_judged_by_their_own_past() -> None:
    """The last head is seen from step 200 on, and dies 100 steps later; another was sharp when it appeared."""

    def course(step: int) -> dict[str, Any]:
        told = in_one(calm(step, falling), HEADS, 7, **dying(ramp(step, 300, 350)))
        told = in_one(told, HEADS, 6, **dying(1.0))
        if step < 200:
            for head in (6, 7):
                told = in_one(told, HEADS, head, **dict.fromkeys(dying(0.0), np.nan))
        return told

    (finding,) = judged(course)
    assert (finding.kind, (finding.layer, finding.head)) == ("entropy-collapse", HEADS[7])
    assert 330 <= finding.first_step <= 350


def test_with_qk_norm_a_spread_out_spectrum_is_no_excuse() -> None:
    def course(step: int) -> dict[str, Any]:
        return in_one(calm(step, falling), HEADS, 3, **(dying(ramp(step, 100, 150)) | {"sec_1": 0.2}))

    assert judged(course) == []
    (finding,) = judged(course, sites=QK_NORM)
    assert finding.kind == "entropy-collapse"
    assert "spectral-bound" not in finding.advice


def test_a_sharp_head_of_high_rank_is_benign_and_no_alarm() -> None:
    def copying(step: int) -> dict[str, Any]:
        return in_one(
            calm(step), HEADS, 5, **(dying(ramp(step, 100, 150)) | {"rank_frac": 0.95, "sec_1": 0.5})
        )

    (finding,) = judged(copying)
    assert (finding.kind, finding.severity, finding.status) == ("benign-entropy-collapse", "info", "healthy")
    assert (finding.layer, finding.head) == HEADS[5]
    assert finding.raised_step == finding.first_step + 20
    assert finding.evidence["heads_sharp"] == 1


def test_a_map_of_high_rank_that_is_not_sharp_is_no_finding() -> None:
    assert judged(lambda step: calm(step) | {"rank_frac": 0.9}) == []


def concentrating(step: int, loss: Callable[[int], float] = flat) -> dict[str, Any]:
    """Every head's spectrum collapses into one direction within 30 steps; the logits grow, and entropy shows nothing."""
    done = ramp(step, 100, 130)
    return calm(step, loss) | {
        "sec_1": 0.1 + 0.6 * done,
        "sigma1": 0.5 * 12**done,
        "max_logit": 4.0 * 7**done,
    }


def test_a_spectrum_that_concentrates_while_sigma1_runs_away_is_a_warning() -> None:
    (finding,) = judged(concentrating)
    assert (finding.kind, finding.severity, finding.status) == (
        "spectral-concentration",
        "warning",
        "at-risk",
    )
    assert finding.raised_step is not None
    assert finding.raised_step <= 140
    assert not finding.active
    assert finding.evidence["mean_sec_1_rise"] >= 0.35
    assert kinds(judged(without(concentrating, "loss"))) == ["spectral-concentration"]


@pytest.mark.parametrize(
    "course",
    [
        lambda step: concentrating(step, falling),
        lambda step: concentrating(step) | {"sec_1": 0.1 + 0.2 * ramp(step, 100, 130)},
        lambda step: concentrating(step) | {"sigma1": 0.5 * 3 ** ramp(step, 100, 130)},
        lambda step: concentrating(step) | {"sigma1": 1e-4 * 12 ** ramp(step, 100, 130)},
        lambda step: calm(step) | {"sec_1": 0.98, "sigma1": 40.0, "entropy_frac": 0.6},
        lambda step: concentrating(step) | {"max_logit": 4.0},
    ],
    ids=[
        "falling loss",
        "spread out",
        "slow sigma1",
        "sigma1 from nothing",
        "high and constant",
        "idle logits",
    ],
)
def test_what_only_looks_like_concentration_is_none(course: Course) -> None:
    assert judged(course) == []


def test_one_head_of_144_concentrating_is_named() -> None:
    def course(step: int) -> dict[str, Any]:
        done = ramp(step, 100, 130)
        return in_one(
            calm(step), BIG, WORST, sec_1=0.4 + 0.55 * done, sigma1=12**done, max_logit=4.0 * 7**done
        )

    (finding,) = judged(course, heads=BIG)
    assert (finding.kind, finding.head) == ("spectral-concentration", BIG[WORST][1])


def test_one_head_alone_says_nothing_in_the_first_50_steps_of_a_loss() -> None:
    def course(step: int) -> dict[str, Any]:
        done = ramp(step, 10, 40)
        return in_one(
            calm(step), BIG, WORST, sec_1=0.4 + 0.55 * done, sigma1=12**done, max_logit=4.0 * 7**done
        )

    assert judged(course, 60, every=5, heads=BIG) == []


def following(pace: float, *, begin: float = 4.0) -> Course:
    """sigma1 grows 30-fold in every head, the logits at a share of its pace (in nats)."""

    def course(step: int) -> dict[str, Any]:
        done = ramp(step, 100, 130)
        return concentrating(step) | {"sigma1": 0.5 * 30**done, "max_logit": begin * 30 ** (pace * done)}

    return course


def counted_at(step: int, course: Course, sites: list[dict[str, Any]] | None = None) -> Any:
    """(H,) the signal of spectral concentration at a step."""
    block = block_of(course, step + 10)
    window = History().window(block, flags_of(sites or []))
    return SpectralConcentration(BANDS[SpectralConcentration]).signal(window)[
        block.steps.tolist().index(step)
    ]


def test_with_qk_norm_sigma1_has_a_band_of_its_own() -> None:
    assert "spectral-concentration" in kinds(judged(following(0.7)))
    assert "spectral-concentration" not in kinds(judged(following(0.7), sites=QK_NORM))
    (finding,) = (f for f in judged(following(1.0), sites=QK_NORM) if f.kind == "spectral-concentration")
    assert "spectral-bound" not in finding.advice


@pytest.mark.parametrize("sites", [None, QK_NORM])
@pytest.mark.parametrize(("pace", "counted"), [(-0.5, 0.0), (0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (2.0, 1.0)])
def test_the_growth_of_sigma1_counts_as_far_as_logits_follow(
    pace: float, counted: float, sites: list[dict[str, Any]] | None
) -> None:
    signal = counted_at(130, following(pace), sites)
    assert signal == pytest.approx(np.full(len(HEADS), counted * np.log(30)), abs=1e-9)


def test_logits_that_begin_small_follow_from_one_and_a_half_on() -> None:
    assert counted_at(130, following(1.0, begin=0.05)).max() == 0.0
    assert counted_at(130, following(1.0, begin=0.5)) == pytest.approx(np.log(0.5 * 30 / 1.5))


def test_where_no_logits_were_observed_sigma1_counts_alone() -> None:
    course = without(following(0.0), "max_logit")
    for sites in (None, QK_NORM):
        assert counted_at(130, course, sites) == pytest.approx(np.log(30))


def test_any_head_of_the_run_may_follow_but_with_qk_norm_each_follows_by_its_own() -> None:
    def course(step: int) -> dict[str, Any]:
        told = following(0.0)(step)
        return in_one(told, HEADS, 5, max_logit=4.0 * 30 ** ramp(step, 100, 130))

    assert counted_at(130, course) == pytest.approx(np.log(30))
    assert counted_at(130, course, QK_NORM) == pytest.approx(np.where(np.arange(8) == 5, np.log(30), 0.0))
    first_layer = [{"name": HEADS[0][0], "flags": ["qk_norm"]}]
    assert counted_at(130, course, first_layer) == pytest.approx(np.repeat([0.0, np.log(30)], 4))


def running_away(step: int, loss: Callable[[int], float] = flat) -> dict[str, Any]:
    return in_one(calm(step, loss), HEADS, 1, max_logit=2.0 * 15 ** ramp(step, 200, 240))


def test_logits_that_multiply_while_the_loss_stands_are_a_warning() -> None:
    (finding,) = judged(running_away)
    assert (finding.kind, finding.layer, finding.head) == ("logit-growth", *HEADS[1])
    assert 230 <= finding.first_step <= 240
    assert finding.evidence["max_logit_growth"] > np.exp(2.0)
    assert finding.evidence["max_logit_growth_healthy"] == "below 7.4-fold in 50 steps"
    assert not finding.active
    assert kinds(judged(without(running_away, "loss"))) == ["logit-growth"]


@pytest.mark.parametrize(
    "course",
    [
        lambda step: running_away(step, falling),
        lambda step: in_one(running_away(step), HEADS, 1, entropy_frac=0.2, rank_frac=0.9),
        lambda step: in_one(calm(step), HEADS, 1, max_logit=0.01 * 90 ** ramp(step, 200, 240)),
        lambda step: in_one(calm(step), HEADS, 1, max_logit=350.0),
        lambda step: calm(step, lambda s: 5 - 0.05 * min(s, 40)) | {"max_logit": 1.0 + min(step, 40)},
    ],
    ids=["falling loss", "benign", "below 1", "large and constant", "warmup"],
)
def test_what_only_looks_like_logit_growth_is_none(course: Course) -> None:
    assert "logit-growth" not in kinds(judged(course))


def uniform(step: int) -> dict[str, Any]:
    """A post-norm stack: from ln V to the unigram loss within 40 steps, and no further."""
    loss = 4.6 - 1.4 * ramp(step, 0, 40) + 0.01 * float(np.sin(step))
    return calm(step) | {
        "loss": loss,
        "entropy_frac": 0.98,
        "max_logit": 1.0,
        "sec_1": 0.3 + 0.6 * ramp(step, 0, 40),
    }


def test_uniform_attention_with_one_direction_at_the_unigram_loss_is_rank_collapse() -> None:
    (finding,) = [f for f in judged(uniform, 300) if f.kind == "rank-collapse"]
    assert (finding.layer, finding.head, finding.status) == (None, None, "at-risk")
    assert finding.raised_step is not None
    assert 100 <= finding.first_step < finding.raised_step <= 180
    assert finding.active
    assert finding.evidence["mean_sec_1"] == pytest.approx(0.9)


@pytest.mark.parametrize(
    "course",
    [
        lambda step: uniform(step) | {"loss": falling(step), "sec_1": 0.9},
        lambda step: uniform(step) | {"loss": 4.6 - 2.6 * ramp(step, 0, 40)},
        lambda step: uniform(step) | {"entropy_frac": 0.5},
        lambda step: uniform(step) | {"sec_1": 0.5},
        without(uniform, "loss"),
    ],
    ids=[
        "falling loss",
        "a loss that came far",
        "attention that chooses",
        "a spread-out spectrum",
        "no loss",
    ],
)
def test_what_only_looks_like_rank_collapse_is_none(course: Course) -> None:
    assert "rank-collapse" not in kinds(judged(course, 300))


def test_a_rank_collapse_that_the_model_leaves_is_cleared() -> None:
    def left(step: int) -> dict[str, Any]:
        return uniform(step) | ({"loss": 3.2 * 0.9 ** ((step - 200) / 50)} if step >= 200 else {})

    (finding,) = [f for f in judged(left, 400) if f.kind == "rank-collapse"]
    assert finding.last_step is not None
    assert 200 < finding.last_step <= 300


def drawn(seed: int) -> Course:
    """A walk of every number through its range, with holes: so that each rule is met, left and met again."""
    draw = np.random.default_rng(seed)
    phases, periods = draw.uniform(0, 6.3, (2, len(HEADS))), draw.uniform(120, 400, (2, len(HEADS)))
    hole = draw.integers(100, 700)

    def course(step: int) -> dict[str, Any]:
        way = 0.5 - 0.5 * np.cos(phases[0] + 6.3 * step / periods[0])
        other = 0.5 - 0.5 * np.cos(phases[1] + 6.3 * step / periods[1])
        noise = np.random.default_rng((seed, step))
        told: dict[str, Any] = {
            "loss": 3.0 + float(np.sin(step / 90)) * 0.5 + float(noise.normal(0, 0.02)),
            "entropy": 4 - 3.9 * way, "entropy_frac": 1 - 0.98 * way, "rank_frac": 0.05 + 0.9 * other,
            "max_logit": np.exp(6 * way + noise.normal(0, 0.1, len(HEADS))),
            "sec_1": 0.3 + 0.69 * way, "sigma1": np.exp(4 * way - 1),
        }  # fmt: skip
        if seed % 2:
            told |= {"rank_frac": 0.02 + 0.3 * other, "sec_1": 0.9 + 0.09 * way}
        for name in ("entropy_frac", "max_logit", "sec_1"):
            told[name] = np.where(noise.random(len(HEADS)) < 0.05, np.nan, told[name])
        if hole <= step < hole + 40:
            told = {"loss": told["loss"]}
        return told

    return course


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("every", [3, 40])
def test_the_same_is_found_bit_for_bit_whatever_the_blocks(seed: int, every: int) -> None:
    block = block_of(drawn(seed), 1200, every=every)
    whole = Five().feed([block])
    assert whole.findings()
    draw = np.random.default_rng(seed)
    singly = in_parts(block, list(range(len(block))))
    for parts in (singly, *(in_parts(block, draw.integers(1, len(block), 9).tolist()) for _ in range(3))):
        split = Five().feed(parts)
        assert split.findings() == whole.findings()
        assert sorted(map(repr, split.raised)) == sorted(map(repr, whole.raised))
        assert split.all_scores() == whole.all_scores()


@pytest.mark.parametrize("seed", range(4))
def test_they_go_on_from_a_saved_state_as_if_never_stopped(seed: int) -> None:
    block = block_of(drawn(seed), 900, every=5)
    whole, stopped = Five().feed([block]), Five()
    for part in in_parts(block, np.random.default_rng(seed).integers(1, len(block), 12).tolist()):
        stopped = stopped.feed([part]).resumed()
    assert stopped.findings() == whole.findings()
    assert stopped.all_scores() == whole.all_scores()


def test_a_head_that_died_before_the_state_was_saved_holds_the_alarm_after_it() -> None:
    block = block_of(one_dies, 400, heads=BIG)
    first, second = in_parts(block, [20])
    (finding,) = Five().feed([first]).resumed().feed([second]).findings()
    assert finding.active


def test_numbers_of_all_findings_stand_beside_their_bands_and_are_plain_data() -> None:
    courses = (one_dies, concentrating, running_away, uniform)
    for course in courses:
        for finding in judged(course, heads=BIG if course is one_dies else HEADS):
            assert any(name.endswith("_healthy") for name in finding.evidence)
            for name in finding.evidence:
                assert name.removesuffix("_healthy") in finding.evidence
            assert json.loads(json.dumps(finding.to_dict())) == finding.to_dict()


def test_the_band_is_told_by_its_edge_and_by_how_far_healthy_runs_went_where_that_is_known() -> None:
    words = fold(50)
    assert (
        below(Band({"plain": 2.0}, {"max": 0.7}), 2.0, words)
        == "below 7.4-fold in 50 steps; healthy runs reached 2.0-fold in 50 steps"
    )
    assert below(Band({"plain": 2.0}, {"max": 0.0}), 2.0, words) == "below 7.4-fold in 50 steps"
    assert below(Band({"plain": 2.0}), 2.0, words) == "below 7.4-fold in 50 steps"
