"""Every run's label, each held against the best run of the same model on the same data."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .labels import Label, label_of, reference_of
from .packing import Arrays
from .recipe import Recipe


class Course(NamedTuple):
    """A run that was made: its recipe, its arrays, and what its run directory or its table says of it."""

    recipe: Recipe
    arrays: Arrays
    about: Mapping[str, Any]


def verdicts(courses: Iterable[Course]) -> dict[str, Label]:
    """Labels by run name; a run without a sound one to be held against gets none."""
    groups: dict[tuple[object, ...], list[Course]] = {}
    for course in courses:
        recipe = course.recipe
        key = (recipe.family, recipe.task, recipe.batch, recipe.label_noise, recipe.steps)
        groups.setdefault(key, []).append(course)
    labels: dict[str, Label] = {}
    for members in groups.values():
        chance = float(members[0].about["chance"])
        reference = reference_of([member.arrays["losses"] for member in members], chance)
        if reference is None:
            continue
        for member in members:
            labels[member.recipe.name] = label_of(member.arrays["losses"], chance=chance, reference=reference)
    return labels
