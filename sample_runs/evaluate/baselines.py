"""What the detectors are measured against: rules of others and plain levels, one threshold each.

Each is scored twice on the same runs: with the threshold it is published with, if it has one, and with its one
threshold frozen on the training families by the same search and the same budget as the detectors.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .channel import Channel, Trace
from .corpus import Course
from .hyperparameters import predictor
from .machine import Values
from .rules import cusum, of_frames, of_steps, sigmas, zclip

Signal = Callable[[Course], Trace]


@dataclass(frozen=True)
class Baseline:
    """One rule.

    Attributes:
        name: what it is called in the tables.
        learn: its signal (larger is worse), learned from the training runs where there is something to learn.
        published: the threshold it is known with; None where it has none.
        standing: it predicts from the first step on, and is not held to the horizon.
    """

    name: str
    learn: Callable[[Sequence[Course]], Signal]
    published: float | None = None
    standing: bool = False

    def channel(self, courses: Sequence[Course], train: Sequence[Course]) -> Channel:
        """The rule as a channel over all runs, with what it learned from some."""
        signal = self.learn(train)
        traces = {course.name: signal(course) for course in courses}
        return Channel(self.name, traces, published=self.published)


def _fixed(signal: Signal) -> Callable[[Sequence[Course]], Signal]:
    return lambda _train: signal


def _max_logit(course: Course) -> Trace:
    return of_frames(course, course.block.head_column("max_logit"), lambda table: np.nanmax(table, axis=1))


def _entropy(course: Course) -> Trace:
    """One over the lowest head's entropy: above 1 / level where it is below the level."""
    return of_frames(
        course,
        course.block.head_column("entropy"),
        lambda table: 1 / np.maximum(np.nanmin(table, axis=1), 1e-3),
    )


def _sec(reduce: Callable[[Values], Values]) -> Signal:
    """One over the energy outside the first direction, so that edges near 1 can be told apart."""
    return lambda course: of_frames(
        course, course.block.head_column("sec_1"), lambda table: 1 / np.maximum(1 - reduce(table), 1e-4)
    )


def _rate_above_peak(course: Course) -> Trace:
    declared = float(course.about["lr"])
    return of_steps(course, course.block.scalar("lr") / declared)


def _after_warmup(course: Course) -> Trace:
    steps = course.block.every_step.astype(np.float64)
    return of_steps(course, (steps + 1) / (float(course.about["warmup"]) + 1))


BASELINES = (
    Baseline(
        "loss, 6 sigma of the last 128 (OLMo-core)",
        _fixed(lambda course: of_steps(course, sigmas(course.block.losses))),
        6.0,
    ),
    Baseline(
        "gradient norm, 6 sigma of the last 128 (OLMo-core)",
        _fixed(lambda course: of_steps(course, sigmas(course.block.scalar("grad_norm")))),
        6.0,
    ),
    Baseline(
        "gradient norm, z > 2.5 (ZClip's trigger)",
        _fixed(lambda course: of_steps(course, zclip(course.block.scalar("grad_norm")))),
        2.5,
    ),
    Baseline("loss CUSUM", _fixed(lambda course: of_steps(course, cusum(course.block.losses))), 5.0),
    Baseline("largest logit above 100", _fixed(_max_logit), 100.0),
    Baseline("lowest entropy below a level", _fixed(_entropy)),
    Baseline("mean SEC above a level", _fixed(_sec(lambda table: np.nanmean(table, axis=1)))),
    Baseline("largest SEC above a level", _fixed(_sec(lambda table: np.nanmax(table, axis=1)))),
    Baseline("learning rate above twice its declared peak", _fixed(_rate_above_peak), 2.0),
    Baseline("hyperparameters only (rate, warmup)", predictor, 1.0, standing=True),
    Baseline("alarm at the end of warmup", _fixed(_after_warmup), 1.0),
    Baseline(
        "alarm at a fixed step",
        _fixed(lambda course: of_steps(course, course.block.every_step.astype(np.float64))),
    ),
)
