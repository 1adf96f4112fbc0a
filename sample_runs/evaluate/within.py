"""What each detector does beside the others, at the edges that each fold froze."""

from collections.abc import Sequence
from typing import Any

from .corpus import Course
from .folds import Fold
from .scores import kind_of
from .scoring import Outcome, judge
from .table import Table


def within_union(
    tables: Sequence[Table], courses: Sequence[Course], folds: Sequence[Fold]
) -> list[dict[str, Any]]:
    """Of each detector: failures it warns of, those it is first or alone to warn of, and its false episodes."""
    kinds = sorted({kind_of(table.name) for table in tables})
    single = {kind: _alone(kind, tables, courses, folds) for kind in kinds}
    rows = []
    for kind, outcomes in single.items():
        others = [single[other] for other in kinds if other != kind]
        failing = [place for place, outcome in enumerate(outcomes) if outcome.course.failing and outcome.lead]
        best = [max((other[place].lead for other in others), default=0) for place in failing]
        leads = [outcomes[place].lead for place in failing]
        rows.append(
            {
                "name": kind,
                "hits": len(failing),
                "first": sum(lead > rest for lead, rest in zip(leads, best, strict=True)),
                "only": sum(rest == 0 for rest in best),
                "late": sum(outcome.verdict == "late" for outcome in outcomes),
                "false_episodes": sum(outcome.false for outcome in outcomes),
            }
        )
    return rows


def _alone(
    kind: str, tables: Sequence[Table], courses: Sequence[Course], folds: Sequence[Fold]
) -> list[Outcome]:
    """Its own alarms on every held-out run, in the order of the runs."""
    own = [table for table in tables if kind_of(table.name) == kind]
    powers = {fold.family: fold.powers for fold in folds}
    return [
        judge(
            course, [step for table in own for step in table.alarms(powers[course.family][table.name], place)]
        )
        for place, course in enumerate(courses)
    ]
