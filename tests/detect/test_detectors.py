"""Each pathology drawn by hand, beside the healthy course that looks most like it."""

import json

import numpy as np
import pytest
from blocks import HEADS, Course, block_of

from diagnostics.detect.finding import Finding
from diagnostics.detect.monitor import Monitor

EVERY = 10


def judged(course: Course, steps: int = 300) -> tuple[str, list[Finding]]:
    monitor = Monitor()
    monitor.feed(block_of(course, steps))
    return monitor.status(), monitor.findings()


def healthy_loss(step: int) -> float:
    return 2.0 + 3.5 * float(np.exp(-step / 60))


def healthy_heads(step: int) -> dict[str, object]:
    """Slow sharpening with slowly growing logits, as the healthy arms of the demonstration show."""
    done = min(1.0, step / 300)
    return {
        "loss": healthy_loss(step), "entropy": 3.9 - 1.5 * done, "entropy_frac": 1.0 - 0.4 * done, "rank_frac": 0.4,
        "max_logit": 1.0 + 22 * done, "sec_1": 0.1 + 0.7 * done, "sigma1": 0.1 + 4 * done,
    }  # fmt: skip


def one_head(step: int, name: str, value: float) -> object:
    """The healthy value everywhere but in the last head."""
    values = np.broadcast_to(np.asarray(healthy_heads(step)[name], float), (len(HEADS),)).copy()
    values[-1] = value
    return values


def test_a_healthy_course_has_no_findings() -> None:
    assert judged(healthy_heads) == ("healthy", [])


def collapsing(step: int) -> dict[str, object]:
    """One head's logits run away fifty-fold from step 100 to 150, its map sinks into low rank."""
    done = min(1.0, max(0.0, (step - 100) / 50))
    return healthy_heads(step) | {
        "max_logit": one_head(step, "max_logit", float(np.exp(4.4 * done))),
        "entropy": one_head(step, "entropy", 3.5 - 3.2 * done),
        "entropy_frac": one_head(step, "entropy_frac", 0.9 - 0.8 * done),
        "rank_frac": one_head(step, "rank_frac", 0.4 - 0.3 * done),
        "sec_1": one_head(step, "sec_1", 0.6 + 0.39 * done),
    }


def test_a_runaway_head_of_low_rank_is_malignant_and_is_named() -> None:
    status, findings = judged(collapsing)
    (finding,) = [f for f in findings if f.kind == "entropy-collapse"]
    assert status == "collapsed"
    assert (finding.layer, finding.head, finding.severity) == ("blocks.1.attn", 3, "critical")
    assert 130 <= finding.first_step <= 150
    assert finding.raised_step == finding.first_step + EVERY
    assert finding.active
    assert finding.evidence["max_logit"] >= 20
    assert finding.evidence["entropy_frac"] <= 0.5


def test_a_slow_collapse_of_most_heads_is_malignant_too() -> None:
    def sinking(step: int) -> dict[str, object]:
        """As linear as can be: nowhere a runaway, and the loss stands still from step 150 on."""
        done = min(1.0, max(0.0, (step - 120) / 280))
        return healthy_heads(min(step, 120)) | {
            "loss": healthy_loss(min(step, 150)), "entropy_frac": 0.9 - 0.85 * done, "rank_frac": 0.5 - 0.45 * done,
            "max_logit": 10.0 + 140 * done, "sec_1": 0.5 + 0.5 * done, "sigma1": 2.0 + 30 * done,
        }  # fmt: skip

    status, findings = judged(sinking, steps=400)
    assert status == "collapsed"
    assert [f.kind for f in findings] == ["entropy-collapse"]
    assert findings[0].evidence["heads_dying"] == len(HEADS)


def test_the_same_entropy_without_growing_logits_is_no_alarm() -> None:
    def sharp_from_the_start(step: int) -> dict[str, object]:
        return healthy_heads(step) | {
            "max_logit": one_head(step, "max_logit", 300.0),
            "entropy_frac": one_head(step, "entropy_frac", 0.02),
            "rank_frac": one_head(step, "rank_frac", 0.1),
            "sec_1": one_head(step, "sec_1", 0.99),
        }

    assert judged(sharp_from_the_start)[0] == "healthy"


def test_a_sharp_head_of_high_rank_is_benign_and_raises_no_alarm() -> None:
    def copying(step: int) -> dict[str, object]:
        return collapsing(step) | {"rank_frac": one_head(step, "rank_frac", 0.95)}

    status, findings = judged(copying)
    assert status == "healthy"
    assert [(f.kind, f.severity, f.head) for f in findings] == [("benign-entropy-collapse", "info", 3)]


def test_a_collapse_that_heals_is_a_finding_with_an_end() -> None:
    def healed(step: int) -> dict[str, object]:
        return collapsing(step) if step < 200 else healthy_heads(step)

    status, findings = judged(healed)
    (finding,) = [f for f in findings if f.kind == "entropy-collapse"]
    assert status == "healthy"
    assert finding.last_step is not None
    assert finding.last_step > 200


def test_fast_concentration_is_a_warning_long_before_entropy_falls() -> None:
    def concentrating(step: int) -> dict[str, object]:
        done = min(1.0, step / 30)
        return healthy_heads(step) | {
            "sec_1": 0.1 + 0.6 * done,
            "sigma1": 0.1 * float(np.exp(4.0 * done)),
            "max_logit": 3.0 * float(np.exp(4.0 * done)),
            "entropy_frac": 0.98,
        }

    _, findings = judged(concentrating, steps=60)
    (finding,) = findings
    assert (finding.kind, finding.status) == ("spectral-concentration", "at-risk")
    assert finding.raised_step is not None
    assert finding.raised_step <= 30


def test_concentration_at_the_pace_of_a_healthy_warmup_is_none() -> None:
    def slow(step: int) -> dict[str, object]:
        return healthy_heads(step) | {"sec_1": 0.1 + 0.7 * min(1.0, step / 100)}

    assert judged(slow) == ("healthy", [])


def test_non_finite_losses_are_divergence_since_the_first_of_them() -> None:
    def broken(step: int) -> dict[str, object]:
        return healthy_heads(step) | ({"loss": float("nan")} if step >= 123 else {})

    status, findings = judged(broken)
    (finding,) = [f for f in findings if f.status != "healthy"]
    assert status == "diverged"
    assert (finding.kind, finding.first_step, finding.raised_step) == ("divergence", 123, 130)


def test_a_single_non_finite_loss_is_no_divergence() -> None:
    def skipped(step: int) -> dict[str, object]:
        return healthy_heads(step) | ({"loss": float("inf")} if step in (50, 123) else {})

    assert judged(skipped) == ("healthy", [])


def test_a_loss_that_was_not_handed_in_is_no_nan_loss() -> None:
    def without_loss(step: int) -> dict[str, object]:
        return {name: value for name, value in healthy_heads(step).items() if name != "loss"}

    assert judged(without_loss) == ("healthy", [])


def test_a_sustained_rise_of_the_loss_is_divergence_and_a_spike_is_not() -> None:
    def risen(step: int) -> dict[str, object]:
        return healthy_heads(step) | ({"loss": 6.0} if step >= 150 else {})

    def spike(step: int) -> dict[str, object]:
        return healthy_heads(step) | ({"loss": 9.0} if 150 <= step < 158 else {})

    status, findings = judged(risen)
    assert status == "diverged"
    (finding,) = [f for f in findings if f.kind == "loss-rise"]
    assert 150 <= finding.first_step <= 180
    assert judged(spike)[0] == "healthy"


@pytest.mark.parametrize(("sec_1", "expected"), [(0.95, "at-risk"), (0.3, "healthy")])
def test_a_flat_loss_is_a_stall_where_attention_shows_why(sec_1: float, expected: str) -> None:
    def stuck(step: int) -> dict[str, object]:
        # Rising slowly enough to be no fast concentration, as a run at the unigram loss does.
        sec = min(sec_1, 0.1 + step / 150)
        return healthy_heads(step) | {
            "loss": 3.15 + 0.01 * np.sin(step) + 2 * np.exp(-step / 15), "entropy_frac": 0.97, "max_logit": 3.0, "sec_1": sec,
        }  # fmt: skip

    assert judged(stuck, steps=400)[0] == expected


def test_nothing_to_judge_is_said_as_such() -> None:
    monitor = Monitor()
    assert monitor.status() == "no-data"
    assert monitor.missing() == ["the run has no steps yet"]
    monitor.feed(block_of(lambda step: {"loss": healthy_loss(step)}, 100))
    assert monitor.status() == "healthy"
    assert len(monitor.missing()) == 3


@pytest.mark.parametrize("cut", [5, 12, 14, 20])
def test_detectors_continue_from_a_saved_state_as_if_never_stopped(cut: int) -> None:
    whole, halved = Monitor(), Monitor()
    raised_whole, raised_halved = [], []
    block = block_of(collapsing, 300)
    for index in range(len(block)):
        if index == cut:
            resumed = Monitor()
            resumed.load_state_dict(json.loads(json.dumps(halved.state_dict())))
            halved = resumed
        frame = block.part(index, index + 1)
        raised_whole += whole.feed(frame)
        raised_halved += halved.feed(frame)
    assert raised_whole == raised_halved
    assert whole.findings() == halved.findings()
