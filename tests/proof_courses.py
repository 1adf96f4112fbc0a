"""Labelled courses drawn by hand, for the tests of `sample_runs/evaluate`."""

from typing import Any

import numpy as np
from blocks import block_of

from diagnostics.detect.block import Block
from sample_runs.evaluate.channel import Channel, Trace
from sample_runs.evaluate.corpus import Course
from sample_runs.evaluate.machine import Rule


def course(
    label: str,
    *,
    onset: int | None = None,
    recovered: int | None = None,
    steps: int = 500,
    name: str = "run",
    family: str = "gpt",
    about: dict[str, Any] | None = None,
    block: Block | None = None,
) -> Course:
    """A run of a label; where nothing else is given, one whose loss stays at 2."""
    return Course(
        name=name,
        family=family,
        cause="none",
        seed=0,
        label=label,
        onset=onset,
        recovered=recovered,
        about={"sites": [], "lr": 1e-3, "warmup": 50, **(about or {})},
        block=block_of(lambda _: {"loss": 2.0}, steps, every=5) if block is None else block,
    )


def channel(
    name: str, courses: list[Course], tops: list[tuple[int, float]], rule: Rule | None = None
) -> Channel:
    """A signal that is 0.1 throughout, but for 20 steps from a step on, in which it has a height."""
    traces = {}
    for one, (step, height) in zip(courses, tops, strict=True):
        steps = one.block.steps
        traces[one.name] = Trace(steps, np.where((steps >= step) & (steps < step + 20), height, 0.1))
    return Channel(name, traces, rule or Rule())
