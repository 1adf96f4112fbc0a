"""Scores of many runs side by side, and the alarms they give at every edge of a fixed lattice."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .machine import AFTER, Bools, Ints, Rule, Values, raised

RATIO = 1.1
"""Edges are integer powers of this: a lattice that no run has a say in, fine enough to lose nothing."""
OFF = 10**6
"""A power that stands for: never alarms."""

Conditions = Callable[[Values], tuple[Bools, Bools]]
"""From scores in units of the edge to where an alarm starts and where an active one stays."""


PLAIN_RULE = Rule()
"""An alarm wherever the edge is crossed upwards."""


@dataclass(frozen=True)
class Trace:
    """A raw signal of one run: `values` (G,) at `steps` (G,); NaN where it cannot be judged.

    `judge`: at an edge where an alarm starts and stays, (G,) each, for a detector whose conditions are not a matter
    of the largest signal alone.
    """

    steps: Ints
    values: Values
    judge: Callable[[float], tuple[Bools, Bools]] | None = None


@dataclass(frozen=True)
class Channel:
    """One signal over all runs with the machine that turns it into alarms. One number is tuned: the edge.

    Attributes:
        name: of the signal.
        traces: by name of the run; runs without the signal are not in it.
        rule: the machine.
        conditions: where an alarm starts and stays, None for the rule's plain thresholds.
        published: the threshold it is known with, None where there is none.
        pinned: whether it keeps that threshold in every fold: it was not found on these runs.
    """

    name: str
    traces: Mapping[str, Trace]
    rule: Rule = PLAIN_RULE
    conditions: Conditions | None = None
    published: float | None = None
    pinned: bool = False

    def edge(self, power: int) -> float:
        """The threshold that a lattice power stands for."""
        return self.published if self.pinned and self.published is not None else edge_of(power)

    @cached_property
    def powers(self) -> tuple[int, int]:
        """The lattice's range: from where the upper half of the runs' maxima begins to above them all."""
        tops = []
        for trace in self.traces.values():
            finite = trace.values[np.isfinite(trace.values) & (trace.values > 0)]
            if len(finite):
                tops.append(float(finite.max()))
        if not tops:
            return 0, 0
        low, high = float(np.quantile(tops, 0.1)), max(tops)
        return power_at_least(low) - 8, power_at_least(high) + 16

    def alarms(self, names: Sequence[str], edge: float) -> dict[str, tuple[int, ...]]:
        """The steps at which alarms are raised at one edge, by name of the run."""
        steps, fired = self.grid(names, np.array([edge]))
        return {name: tuple(steps[row][fired[0, row]].tolist()) for row, name in enumerate(names)}

    def grid(self, names: Sequence[str], edges: Values) -> tuple[Ints, Bools]:
        """Steps (C, G) and where alarms are raised (E, C, G), runs in the order of `names`."""
        width = max((len(self.traces[name].steps) for name in names if name in self.traces), default=0)
        steps = np.full((len(names), width), AFTER, dtype=np.int64)
        values = np.full((len(names), width), np.nan)
        for row, name in enumerate(names):
            trace = self.traces.get(name)
            if trace is not None:
                steps[row, : len(trace.steps)] = trace.steps
                values[row, : len(trace.steps)] = trace.values
        known = ~np.isnan(values)
        scores = np.where(known, values, 0.0)[None] / edges[:, None, None]
        start, stay = self._conditions(scores)
        for row, name in enumerate(names):
            trace = self.traces.get(name)
            if trace is not None and trace.judge is not None:
                for place, edge in enumerate(edges.tolist()):
                    here = slice(None, len(trace.steps))
                    start[place, row, here], stay[place, row, here] = trace.judge(edge)
        return steps, raised(steps, start, stay, known, self.rule)

    def _conditions(self, scores: Values) -> tuple[Bools, Bools]:
        if self.conditions is not None:
            return self.conditions(scores)
        return scores >= 1.0, scores >= self.rule.stay_share


def power_at_least(value: float) -> int:
    """The smallest lattice power whose edge is no less than a positive value."""
    return math.ceil(math.log(value) / math.log(RATIO) - 1e-9)


def edge_of(power: int) -> float:
    """The edge at a lattice power, to four digits as it is shipped and applied."""
    return math.inf if power >= OFF else float(f"{RATIO**power:.4g}")


def lattice(powers: tuple[int, int]) -> tuple[Ints, Values]:
    """All powers of a range, ends included, with their edges."""
    every = np.arange(powers[0], powers[1] + 1, dtype=np.int64)
    return every, np.array([edge_of(int(power)) for power in every])
