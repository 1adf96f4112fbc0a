"""The baselines on the same runs, folds and scoring as the detectors."""

from collections.abc import Iterator, Sequence
from typing import Any

from .baselines import BASELINES, Baseline
from .corpus import Course
from .figures import pooled
from .fitting import fit
from .folds import ANY_STRATEGY, choose, families, outcomes
from .scoring import Outcome, judge
from .table import Table, table_of


def compared(
    courses: Sequence[Course], baselines: Sequence[Baseline] = BASELINES
) -> Iterator[dict[str, Any]]:
    """Of each baseline its name, its figures at its published threshold and at thresholds frozen on other families."""
    for baseline in baselines:
        yield {
            "name": baseline.name,
            "threshold": baseline.published,
            "published": None
            if baseline.published is None
            else pooled(_published(baseline, courses)).to_dict(),
            "tuned": pooled(_tuned(baseline, courses)).to_dict(),
        }


def _published(baseline: Baseline, courses: Sequence[Course]) -> list[Outcome]:
    assert baseline.published is not None
    found: list[Outcome] = []
    for train, test in _splits(baseline, courses):
        channel = baseline.channel(courses, train)
        alarms = channel.alarms([course.name for course in test], baseline.published)
        found += [judge(course, alarms[course.name], standing=baseline.standing) for course in test]
    return found


def _tuned(baseline: Baseline, courses: Sequence[Course]) -> list[Outcome]:
    found: list[Outcome] = []
    table: Table | None = None
    for family in families(courses):
        train = [place for place, course in enumerate(courses) if course.family != family]
        test = [place for place, course in enumerate(courses) if course.family == family]
        if table is None or baseline.standing:
            channel = baseline.channel(courses, [courses[place] for place in train])
            table = table_of(channel, courses, standing=baseline.standing)
        strategy = choose([table], courses, train, among=ANY_STRATEGY, standing=baseline.standing)
        powers = fit([table], courses, train, strategy)
        found += outcomes([table], courses, test, powers, standing=baseline.standing)
    return found


def _splits(baseline: Baseline, courses: Sequence[Course]) -> Iterator[tuple[list[Course], list[Course]]]:
    """Training and test runs; one split of everything where there is nothing to learn."""
    if not baseline.standing:
        yield [], list(courses)
        return
    for family in families(courses):
        train = [course for course in courses if course.family != family]
        yield train, [course for course in courses if course.family == family]
