"""What each detector and each candidate signal is worth: alone, left out, added; refitted on every fold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from diagnostics.detect.block import Block

from .channel import OFF
from .corpus import Course
from .figures import Figures, pooled
from .folds import ANY_STRATEGY, Fold, figures_of, held_out
from .scores import alarming, detector_channels, kind_of
from .scoring import Outcome, judge
from .table import Table


def ablated(
    tables: Sequence[Table], candidates: Sequence[Table], courses: Sequence[Course], folds: Sequence[Fold]
) -> Iterator[dict[str, Any]]:
    """Rows with a `name`, `what` was done, and the held-out figures.

    With others, the strategy of each fold is that of all detectors together, so that nothing but the signal differs;
    alone, a signal gets the one that suits it best within the training families.
    """
    strategies = {fold.family: fold.strategy for fold in folds}

    def figures(some: Sequence[Table]) -> Figures:
        return figures_of(held_out(some, courses, strategies))

    def alone(some: Sequence[Table]) -> Figures:
        return figures_of(held_out(some, courses, among=ANY_STRATEGY))

    for kind in sorted({kind_of(table.name) for table in tables}):
        own = [table for table in tables if kind_of(table.name) == kind]
        rest = [table for table in tables if kind_of(table.name) != kind]
        yield {"name": kind, "what": "alone", **alone(own).to_dict()}
        yield {"name": kind, "what": "left out", **figures(rest).to_dict()}
    for table in candidates:
        yield {"name": table.name, "what": "alone", **alone([table]).to_dict()}
        yield {"name": table.name, "what": "added", **figures([*tables, table]).to_dict()}


def measured_half_as_often(courses: Sequence[Course], folds: Sequence[Fold]) -> Figures:
    """Every other measured step left out, edges as each fold froze them."""
    thinned = [replace(course, block=thin(course.block)) for course in courses]
    channels = alarming(detector_channels(thinned))
    found: list[Outcome] = []
    for fold in folds:
        test = [course for course in thinned if course.family == fold.family]
        alarms = union(
            [channel.alarms([c.name for c in test], channel.edge(fold.powers[channel.name])) for channel in channels
             if fold.powers.get(channel.name, OFF) != OFF]
        )  # fmt: skip
        found += [judge(course, alarms.get(course.name, ())) for course in test]
    return pooled(found)


def union(alarms: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[int]]:
    """All alarms of several channels, by run."""
    together: dict[str, list[int]] = {}
    for of_channel in alarms:
        for name, steps in of_channel.items():
            together.setdefault(name, []).extend(steps)
    return together


def thin(block: Block) -> Block:
    """The same run with every other frame, the last one included: frames become longer, steps stay."""
    kept = np.arange(0, len(block), 2)
    if len(kept) and kept[-1] != len(block) - 1:
        kept = np.append(kept, len(block) - 1)
    return replace(
        block,
        steps=block.steps[kept],
        ends=block.ends[kept],
        attention={name: values[kept] for name, values in block.attention.items()},
        spectra={name: values[kept] for name, values in block.spectra.items()},
        updates={name: values[kept] for name, values in block.updates.items()},
    )
