"""With the bands that ship, the proof counts the very alarms that a live run raises."""

import numpy as np
import pytest
from blocks import HEADS, block_of
from proof_courses import course

from diagnostics.detect.bands import shipped_bands
from diagnostics.detect.monitor import Monitor
from sample_runs.evaluate.corpus import CORPUS, Course, load_course
from sample_runs.evaluate.scores import alarming, detector_channels, kind_of

KINDS = ("dying", "dead", "well", "bursting", "stuck", "nan")


def told(kind: str, step: int) -> dict[str, object]:
    """A run with something of everything."""
    bumps = 0.05 * float(np.sin(1.7 * step))
    ill = max(0, step - 200) / 50
    grown = np.exp(np.linspace(0.5, 1.0, len(HEADS)) * (ill if kind == "dying" else 0.02 * ill))
    if kind == "dead":  # dying for 100 steps, sharp and still for 100, dying again
        grown = np.exp(np.linspace(1.0, 2.0, len(HEADS)) * (min(ill, 2.0) + max(0.0, ill - 4.0)))
    loss = (
        4.0 * np.exp(-min(step, 200) / 150)
        + bumps
        + (0.3 * max(0.0, ill - 2) if kind in ("dying", "dead") else 0.0)
    )
    if kind == "stuck":
        loss = 3.3 + bumps
    if kind == "nan" and step > 300:
        loss = np.nan
    burst = 40.0 if kind == "bursting" and 300 <= step < 330 else 1.0
    return {
        "loss": loss * (3.0 if kind == "bursting" and 310 <= step < 315 else 1.0),
        "grad_norm": (1.0 + bumps) * burst,
        "lr": 1e-3 * (20.0 if kind == "bursting" and step >= 300 else 1.0),
        "adam_rms": 1.0 + bumps + (3.0 if kind == "bursting" and step >= 300 else 0.0),
        "entropy": 3.0 / grown,
        "entropy_frac": 0.8 / grown,
        "entropy_bound": 0.1 / grown,
        "rank_frac": 0.6 / grown,
        "max_logit": 5.0 * grown,
        "sigma1": 1.0 * grown,
        "sec_1": 1 - 0.5 / grown if kind != "stuck" else 0.98,
        "stable_rank": 1.0 + 4.0 / grown,
        "effective_rank": 8.0 / grown,
        "ratio": 0.01 * burst,
        "scale": 1.0,
    }


def made(kind: str, flags: tuple[str, ...] = ()) -> Course:
    sites = [{"name": layer, "flags": list(flags)} for layer in sorted({layer for layer, _ in HEADS})]
    block = block_of(lambda step: told(kind, step), 500, every=5)
    return course("healthy", name=kind, block=block, about={"sites": sites})


def assert_same_alarms(courses: list[Course]) -> list[str]:
    """Holds the proof's alarms against the monitor's findings; returns the kinds that were raised."""
    channels = detector_channels(courses)
    raised = []
    for one in courses:
        monitor = Monitor(one.about["sites"])
        monitor.feed(one.block)
        expected = sorted((finding.kind, finding.raised_step) for finding in monitor.findings())
        found = sorted(
            (kind_of(channel.name), step)
            for channel in channels
            for step in channel.alarms([one.name], channel.published or np.inf)[one.name]
        )
        assert found == expected, one.name
        raised += [kind for kind, _ in found]
    return raised


@pytest.mark.parametrize("flags", [(), ("qk_norm",)])
def test_the_alarms_scored_are_the_findings_of_the_monitor(flags: tuple[str, ...]) -> None:
    raised = assert_same_alarms([made(kind, flags) for kind in KINDS])
    assert len(set(raised)) > 5


def test_they_are_on_runs_of_the_corpus_too() -> None:
    tables = sorted((CORPUS / "tables").glob("*.npz"))[::15]
    assert tables
    assert_same_alarms([load_course(path) for path in tables])


def test_findings_that_leave_the_status_healthy_are_no_alarms() -> None:
    channels = detector_channels([made("dying")])
    kinds = {kind_of(channel.name) for channel in alarming(channels)}
    assert "not-attention" not in kinds
    assert "entropy-collapse" in kinds
    assert {kind_of(channel.name) for channel in channels} == set(shipped_bands())
