"""The machine for many edges and runs at a time against the one that ships."""

import numpy as np
import pytest

from diagnostics.detect.alarm import Alarm
from sample_runs.evaluate.channel import Channel, Trace
from sample_runs.evaluate.machine import Rule

RULES = [Rule(), Rule(2, 3, 100, 0.5), Rule(3, 1, 0, 0.8), Rule(1, 2, 30, 0.5)]


@pytest.mark.parametrize("rule", RULES)
def test_both_machines_raise_the_same_alarms_on_random_scores(rule: Rule) -> None:
    random = np.random.default_rng(0)
    traces = {}
    for run in range(6):
        frames = 40 + 20 * run
        values = np.exp(np.repeat(random.normal(size=frames), 2)[:frames])
        values[random.random(frames) < 0.1] = np.nan
        traces[f"run-{run}"] = Trace(np.cumsum(random.integers(1, 12, frames)), values)
    channel = Channel("noise", traces, rule)
    count = 0
    for edge in (0.5, 1.0, 2.0, 4.0):
        found = channel.alarms(list(traces), edge)
        for name, trace in traces.items():
            alarm = Alarm(needed=rule.needed, calm=rule.calm, refractory=rule.refractory)
            score = np.where(np.isnan(trace.values), -1.0, trace.values / edge)
            turns = alarm.run(trace.steps, score >= 1.0, score >= rule.stay_share, score >= 0.0)
            assert found[name] == tuple(int(trace.steps[turn.frame]) for turn in turns if turn.raised)
            count += len(found[name])
    assert count > 20


def test_a_run_without_the_signal_has_no_alarms() -> None:
    channel = Channel("noise", {"a": Trace(np.array([0, 5]), np.array([3.0, 3.0]))})
    assert channel.alarms(["b", "a"], 1.0) == {"b": (), "a": (0,)}
