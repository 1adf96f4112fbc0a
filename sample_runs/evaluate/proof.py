"""Everything that is measured, put together as one document."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from .ablation import ablated, measured_half_as_often
from .candidates import candidate_channels
from .channel import OFF, Channel, edge_of
from .compare import compared
from .corpus import Course
from .figures import pooled
from .fitting import fit
from .folds import Fold, choose, families, figures_of, held_out, outcomes
from .forecast import forecast_figures
from .scores import alarming
from .scoring import Outcome, judge
from .table import Table, table_of
from .within import within_union

Say = Callable[[str], None]


def proof(courses: Sequence[Course], channels: Sequence[Channel], say: Say) -> dict[str, Any]:
    """All figures of the corpus.

    Args:
        courses: all labelled runs.
        channels: of all detectors on them.
        say: told what is being done.
    """
    say("trying every edge on every run")
    alarms = alarming(channels)
    tables = [table_of(channel, courses) for channel in alarms]
    say("holding families out")
    folds = held_out(tables, courses)
    everything = [outcome for fold in folds for outcome in fold.outcomes]
    document: dict[str, Any] = {
        "corpus": _corpus(courses),
        "held_out": figures_of(folds).to_dict(),
        "by_family": _by(everything, lambda course: course.family),
        "by_cause": _by(everything, lambda course: course.cause),
        "by_label": _by(everything, lambda course: course.label),
        "in_sample": _in_sample(tables, courses),
        "shipped": pooled(shipped_outcomes(alarms, courses)).to_dict(),
        "within": within_union(tables, courses, folds),
        "folds": [_fold(fold, [table.name for table in tables if not table.pinned]) for fold in folds],
    }
    say("measuring half as often")
    document["half_as_often"] = measured_half_as_often(courses, folds).to_dict()
    document["baselines"] = []
    for row in compared(courses):
        say(f"baseline: {row['name']}")
        document["baselines"].append(row)
    document["ablation"] = []
    candidates = [table_of(channel, courses) for channel in candidate_channels(courses)]
    for row in ablated(tables, candidates, courses, folds):
        say(f"ablation: {row['name']} {row['what']}")
        document["ablation"].append(row)
    say("coverage of the forecast")
    document["forecast"] = forecast_figures(courses)
    return document


def fitted_powers(channels: Sequence[Channel], courses: Sequence[Course]) -> dict[str, int]:
    """Edges from all families, as they ship."""
    tables = [table_of(channel, courses) for channel in alarming(channels)]
    every = range(len(courses))
    return fit(tables, courses, every, choose(tables, courses, every))


def shipped_outcomes(channels: Sequence[Channel], courses: Sequence[Course]) -> list[Outcome]:
    """With the bands that are in the package now, which have seen these runs."""
    names = [course.name for course in courses]
    found: dict[str, list[int]] = {name: [] for name in names}
    for channel in channels:
        if channel.published is not None:
            for name, steps in channel.alarms(names, channel.published).items():
                found[name].extend(steps)
    return [judge(course, found[course.name]) for course in courses]


def _in_sample(tables: Sequence[Table], courses: Sequence[Course]) -> dict[str, Any]:
    every = range(len(courses))
    powers = fit(tables, courses, every, choose(tables, courses, every))
    return pooled(outcomes(tables, courses, every, powers)).to_dict()


def _corpus(courses: Sequence[Course]) -> dict[str, Any]:
    return {
        "runs": len(courses),
        "steps": sum(course.steps for course in courses),
        "families": len(families(courses)),
        "causes": len({course.cause for course in courses}),
        "labels": dict(sorted(Counter(course.label for course in courses).items())),
    }


def _by(some: Sequence[Outcome], key: Callable[[Course], str]) -> dict[str, Any]:
    return {
        name: pooled([outcome for outcome in some if key(outcome.course) == name]).to_dict()
        for name in sorted({key(outcome.course) for outcome in some})
    }


def _fold(fold: Fold, fitted: Sequence[str]) -> dict[str, Any]:
    return {
        "family": fold.family,
        "budget": fold.strategy.budget,
        "margin": fold.strategy.margin,
        "edges": {
            name: None if fold.powers[name] == OFF else edge_of(fold.powers[name]) for name in sorted(fitted)
        },
        "runs": [
            {
                "name": outcome.course.name,
                "label": outcome.course.label,
                "onset": outcome.course.onset,
                "verdict": outcome.verdict,
                "lead": outcome.lead,
                "alarms": list(outcome.begins),
            }
            for outcome in fold.outcomes
        ],
    }
