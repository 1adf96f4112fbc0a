"""What every edge of a channel is worth on every run: computed once, then thresholds are tried by looking up."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .channel import OFF, Channel, lattice
from .corpus import HEALTHY, SPIKE, Course
from .machine import Bools, Ints
from .scoring import HORIZON, MERGE, excused


@dataclass(frozen=True)
class Table:
    """C runs, E edges of the lattice, the last row standing for `never alarms`.

    Attributes:
        name: of the channel.
        first: lattice power of the first row.
        has: (C,) whether the run has the signal.
        steps, fired: (C, G) and (E + 1, C, G) where alarms are raised.
        lead: (E + 1, C) of failing runs, from the first episode within the horizon; 0 where there is none.
        caught: (E + 1, C) whether a failing run is alarmed at all, late included.
        wrong: (E + 1, C, B) whether a false episode begins in each stretch of `MERGE` steps.
        pinned: whether the first row is the only one to be chosen.
    """

    name: str
    first: int
    has: Bools
    steps: Ints
    fired: Bools
    lead: Ints
    caught: Bools
    wrong: Bools
    pinned: bool = False

    @property
    def off(self) -> int:
        return len(self.fired) - 1

    def row(self, power: int) -> int:
        """The row of a lattice power; above the range nothing alarms, below it everything as at its lower end."""
        return min(max(power - self.first, 0), self.off)

    def power(self, row: int) -> int:
        return OFF if row >= self.off else self.first + row

    def alarms(self, power: int, run: int) -> list[int]:
        """Steps at which alarms are raised on one run."""
        found: list[int] = self.steps[run][self.fired[self.row(power), run]].tolist()
        return found


def table_of(channel: Channel, courses: Sequence[Course], *, standing: bool = False) -> Table:
    """Tries every edge on every run."""
    names = [course.name for course in courses]
    powers, edges = lattice((0, 0) if channel.pinned else channel.powers)
    if channel.pinned:
        edges = np.array([channel.edge(0)])
    steps, fired = channel.grid(names, edges)
    fired = np.concatenate([fired, np.zeros_like(fired[:1])])
    begins = _begins(steps, fired)
    onset = np.array([-1 if not c.failing or c.onset is None else c.onset for c in courses], dtype=np.int64)
    ahead = onset[:, None] - steps
    hit = begins & ((ahead > 0) & ((ahead <= HORIZON) | standing))[None]
    return Table(
        name=channel.name,
        first=int(powers[0]),
        has=np.array([name in channel.traces for name in names]),
        steps=steps,
        fired=fired,
        lead=np.where(hit, ahead[None], 0).max(axis=2, initial=0),
        caught=np.asarray((fired & (onset >= 0)[None, :, None]).any(axis=2)),
        wrong=_wrong(courses, steps, begins),
        pinned=channel.pinned,
    )


def _begins(steps: Ints, fired: Bools) -> Bools:
    """Where episodes begin."""
    last = np.maximum.accumulate(np.where(fired, steps[None], -(2**40)), axis=2)
    before = np.concatenate([np.full_like(last[:, :, :1], -(2**40)), last[:, :, :-1]], axis=2)
    return np.asarray(fired & (steps[None] - before > MERGE))


def _wrong(courses: Sequence[Course], steps: Ints, begins: Bools) -> Bools:
    quiet = np.zeros(steps.shape, dtype=np.bool_)
    for row, course in enumerate(courses):
        if course.label == HEALTHY:
            quiet[row] = True
        elif course.label == SPIKE:
            first, last = excused(course)
            quiet[row] = (steps[row] < first) | (steps[row] > last)
    stretch = steps // MERGE
    count = max((int(course.block.every_step[-1]) // MERGE + 1 for course in courses), default=0)
    false = begins & quiet[None]
    found = [(false & (stretch == number)[None]).any(axis=2) for number in range(count)]
    return np.stack(found, axis=2) if found else np.zeros((*begins.shape[:2], 0), dtype=np.bool_)
