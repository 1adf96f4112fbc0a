"""Edges are found where they can be, and nothing is learned from what is held out."""

from dataclasses import replace

import pytest
from proof_courses import channel, course

from sample_runs.evaluate.channel import OFF, Channel, edge_of
from sample_runs.evaluate.corpus import Course
from sample_runs.evaluate.fitting import Strategy, fit
from sample_runs.evaluate.folds import figures_of, held_out
from sample_runs.evaluate.scores import FITTED, detector_channels
from sample_runs.evaluate.table import Table, table_of


def many(families: tuple[str, ...] = ("gpt", "vit", "llama")) -> list[Course]:
    """Three healthy and two failing runs a family."""
    return [
        course(label, onset=onset, name=f"{family}-{number}", family=family)
        for family in families
        for number, (label, onset) in enumerate(
            [("healthy", None), ("healthy", None), ("healthy", None), ("crash", 400), ("crash", 450)]
        )
    ]


def test_an_edge_comes_between_the_healthy_and_the_failing() -> None:
    courses = many()
    tops = [(300, 9.0) if one.failing else (300, 3.0) for one in courses]
    table = table_of(channel("growth", courses, tops), courses)
    powers = fit([table], courses, range(len(courses)), Strategy())
    assert 3.0 < edge_of(powers["growth"]) < 9.0


def test_two_detectors_share_the_failures_between_them() -> None:
    courses = many()
    first = [(300, 9.0) if one.name.endswith("3") else (200, 3.0) for one in courses]
    second = [(380, 50.0) if one.name.endswith("4") else (200, 20.0) for one in courses]
    tables = [
        table_of(channel("a", courses, first), courses),
        table_of(channel("b", courses, second), courses),
    ]
    figures = figures_of(held_out(tables, courses))
    assert (figures.recall, figures.false) == (1.0, 0)
    assert set(figures.leads) == {70, 100}


def test_a_detector_that_gives_nothing_keeps_clear_of_every_healthy_value() -> None:
    courses = many()
    useful = [(300, 9.0) if one.failing else (300, 3.0) for one in courses]
    noise = [(100, 5.0) for _ in courses]
    tables = [
        table_of(channel("a", courses, useful), courses),
        table_of(channel("b", courses, noise), courses),
    ]
    powers = fit(tables, courses, range(len(courses)), Strategy())
    assert edge_of(powers["b"]) > 5.0 * 1.8


def test_false_alarms_stay_within_the_budget_when_the_signal_tells_nothing_apart() -> None:
    courses = many()
    tops = [(300, 5.0 + 0.3 * number) for number, _ in enumerate(courses)]
    table = table_of(channel("level", courses, tops), courses)
    powers = fit([table], courses, range(len(courses)), Strategy(budget=0.3))
    alarmed = sum(
        bool(table.alarms(powers["level"], place)) for place, one in enumerate(courses) if not one.failing
    )
    # 9 healthy runs of 500 steps: 0.3 per 1,000 steps are one episode.
    assert alarmed <= 1


def test_what_is_held_out_moves_no_edge() -> None:
    courses = many()
    tops = [(300, 9.0) if one.failing else (300, 3.0) for one in courses]
    changed = [replace(one, label="healthy", onset=None) if one.family == "vit" else one for one in courses]
    edges = []
    for some in (courses, changed):
        folds = held_out([table_of(channel("growth", some, tops), some)], some)
        edges.append({fold.family: fold.powers["growth"] for fold in folds})
    assert edges[0]["vit"] == edges[1]["vit"]


def test_sites_of_a_kind_that_training_did_not_see_take_the_plain_edge() -> None:
    courses = many(("gpt", "vit", "normed"))
    tops = [(300, 9.0) if one.failing else (300, 3.0) for one in courses]
    whole = channel("growth", courses, tops)
    plain = replace(whole, traces={k: v for k, v in whole.traces.items() if not k.startswith("normed")})
    normed = replace(
        whole,
        name="growth@qk_norm",
        traces={k: v for k, v in whole.traces.items() if k.startswith("normed")},
    )
    folds = held_out([table_of(plain, courses), table_of(normed, courses)], courses)
    fold = next(fold for fold in folds if fold.family == "normed")
    assert fold.powers["growth@qk_norm"] == fold.powers["growth"]
    assert figures_of(folds).recall == 1.0


def pinned(name: str, courses: list[Course], edge: float, tops: list[tuple[int, float]]) -> Channel:
    """A detector whose edge comes from elsewhere."""
    return replace(channel(name, courses, tops), published=edge, pinned=True)


@pytest.mark.parametrize("budget", [0.0, 0.07, 100.0])
@pytest.mark.parametrize("height", [3.0, 9.0])
def test_a_pinned_detector_keeps_its_edge_whatever_it_costs_and_whatever_the_budget(
    budget: float, height: float
) -> None:
    courses = many()
    # Healthy runs lie above its edge and failing ones below, or the other way round.
    tops = [(300, 12.0 - height) if one.failing else (300, height) for one in courses]
    table = table_of(pinned("rule", courses, 5.0, tops), courses)
    other = table_of(channel("growth", courses, [(300, 9.0) for _ in courses]), courses)
    for margin in (0, 3):
        powers = fit([other, table], courses, range(len(courses)), Strategy(budget=budget, margin=margin))
        for place, one in enumerate(courses):
            over = (height < 5.0) if one.failing else (height > 5.0)
            assert table.alarms(powers["rule"], place) == ([300] if over else [])


def fitted_beside(quiet_rule: float) -> tuple[Table, int, list[Course]]:
    """A fitted detector beside a pinned one that reaches that height, at an edge of 5, in six healthy runs of nine.

    At the lower edge the fitted one sees the second failure of each family too, and two healthy runs besides.
    """
    courses = many()
    healthy = [one.name for one in courses if not one.failing]
    rule = [(100, quiet_rule if one.name in healthy[:6] else 0.1) for one in courses]
    growth = [(300, 9.0 if one.name.endswith("3") else 4.0) for one in courses]
    growth = [
        (300, 0.1) if one.name in healthy[:-2] else top for one, top in zip(courses, growth, strict=True)
    ]
    tables = [
        table_of(channel("growth", courses, growth), courses),
        table_of(pinned("rule", courses, 5.0, rule), courses),
    ]
    # 9 healthy runs of 500 steps: 1.4 per 1,000 steps are six episodes.
    powers = fit(tables, courses, range(len(courses)), Strategy(budget=1.4))
    return tables[0], powers["growth"], courses


@pytest.mark.parametrize(("quiet_rule", "warned"), [(3.0, {"3", "4"}), (9.0, {"3"})])
def test_the_false_alarms_of_a_pinned_detector_are_taken_from_the_budget_of_the_others(
    quiet_rule: float, warned: set[str]
) -> None:
    table, power, courses = fitted_beside(quiet_rule)
    assert {
        one.name[-1] for place, one in enumerate(courses) if one.failing and table.alarms(power, place)
    } == warned


def test_the_margin_of_the_strategy_is_for_fitted_edges_alone() -> None:
    courses = many()
    just_below = table_of(pinned("rule", courses, 5.0, [(100, 4.9) for _ in courses]), courses)
    growth = table_of(
        channel("growth", courses, [(300, 9.0) if one.failing else (300, 0.1) for one in courses]), courses
    )
    powers = fit([growth, just_below], courses, range(len(courses)), Strategy(budget=0.0, margin=3))
    assert powers["growth"] != OFF
    assert not any(just_below.alarms(powers["rule"], place) for place in range(len(courses)))


def test_only_the_detectors_that_are_said_to_be_fitted_are_fitted() -> None:
    channels = detector_channels([course("healthy", steps=60)])
    assert {one.name.partition("@")[0] for one in channels if not one.pinned} == set(FITTED)
    assert all(one.edge(0) == one.edge(OFF) == one.published for one in channels if one.pinned)
    assert all(one.edge(0) == 1.0 for one in channels if not one.pinned)
