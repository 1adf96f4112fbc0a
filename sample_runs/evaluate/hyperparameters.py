"""A predictor that sees nothing of the run but its declared learning rate and warmup."""

from collections.abc import Callable, Sequence

import numpy as np

from .channel import Trace
from .corpus import DEGRADED, Course
from .machine import Values

RIDGE = 0.1
ROUNDS = 30


def predictor(train: Sequence[Course]) -> Callable[[Course], Trace]:
    """A logistic regression on ln rate, ln(1 + warmup) and their product.

    Its signal is the odds that the run fails, known at the first step.
    """
    known = [course for course in train if course.label != DEGRADED]
    table = np.array([_features(course) for course in known]).reshape(len(known), -1)
    middle, scale = table.mean(axis=0), np.maximum(table.std(axis=0), 1e-9)
    failing = np.array([course.failing for course in known], dtype=np.float64)
    weights = _logistic(_design((table - middle) / scale), failing)

    def signal(course: Course) -> Trace:
        row = _design(((np.array(_features(course)) - middle) / scale)[None])
        odds = np.exp(np.clip(row @ weights, -30.0, 30.0))
        return Trace(course.block.every_step[:1], odds)

    return signal


def _features(course: Course) -> list[float]:
    rate, warmup = np.log(float(course.about["lr"])), np.log1p(float(course.about["warmup"]))
    return [float(rate), float(warmup), float(rate * warmup)]


def _design(table: Values) -> Values:
    return np.concatenate([np.ones((len(table), 1)), table], axis=1)


def _logistic(design: Values, failing: Values) -> Values:
    """Ridge-penalised maximum likelihood by Newton's method; the constant is not penalised."""
    penalty = np.diag([0.0, *[RIDGE] * (design.shape[1] - 1)])
    weights = np.zeros(design.shape[1])
    for _ in range(ROUNDS):
        chance = 1 / (1 + np.exp(-np.clip(design @ weights, -30.0, 30.0)))
        gradient = design.T @ (failing - chance) - penalty @ weights
        hessian = (
            (design * (chance * (1 - chance))[:, None]).T @ design + penalty + 1e-9 * np.eye(len(weights))
        )
        weights = weights + np.linalg.solve(hessian, gradient)
    return weights
