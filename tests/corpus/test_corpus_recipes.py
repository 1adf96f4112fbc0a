"""The recipes as committed, and the index of what became of them."""

import json
from collections import Counter
from pathlib import Path

import pytest

from sample_runs.corpus.families import FAMILIES
from sample_runs.corpus.labels import FAILING, HEALTHY, SPIKE
from sample_runs.corpus.make import INDEX, TABLES
from sample_runs.corpus.recipe import Recipe, read_recipes

RECIPES = read_recipes()
ROWS = json.loads(INDEX.read_text(encoding="utf-8"))


def test_there_are_enough_runs_and_every_family_has_its_share() -> None:
    assert len(RECIPES) >= 90
    families = Counter(recipe.family for recipe in RECIPES)
    assert set(families) == set(FAMILIES)
    assert min(families.values()) >= 9
    assert len({recipe.cause for recipe in RECIPES}) >= 12


def test_the_index_and_the_tables_are_of_these_recipes() -> None:
    names = [recipe.name for recipe in RECIPES]
    assert [row["name"] for row in ROWS] == names
    assert sorted(path.stem for path in TABLES.iterdir()) == sorted(names)
    assert max(path.stat().st_size for path in TABLES.iterdir()) < 200_000


def test_at_least_half_of_the_runs_are_healthy_and_each_family_has_both_kinds() -> None:
    labels = Counter(row["label"] for row in ROWS)
    failing = sum(labels[label] for label in FAILING)
    assert 2 * (labels[HEALTHY] + labels[SPIKE]) >= len(ROWS)
    assert failing >= 35
    for family in FAMILIES:
        of_family = Counter(row["label"] for row in ROWS if row["family"] == family)
        assert of_family[HEALTHY] + of_family[SPIKE] >= 5, family
        assert sum(of_family[label] for label in FAILING) >= 3, family


def test_a_failing_run_has_an_onset_within_its_steps_and_a_healthy_one_has_none() -> None:
    for row in ROWS:
        if row["label"] in (*FAILING, SPIKE):
            assert 0 <= row["onset_step"] < row["steps"], row
        else:
            assert row["onset_step"] is None, row


def test_recipes_that_differ_have_digests_that_differ() -> None:
    assert len({recipe.digest for recipe in RECIPES}) == len(RECIPES)


def test_a_setting_that_no_recipe_knows_is_named(tmp_path: Path) -> None:
    text = 'family = "gpt"\n[[run]]\ncause = "a"\nseeds = [0]\nlearning_rate = 1.0\n'
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="learning_rate"):
        read_recipes(tmp_path)


def test_two_runs_of_one_name_are_refused(tmp_path: Path) -> None:
    text = 'family = "gpt"\n[[run]]\ncause = "a"\nseeds = [0, 0]\n'
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="gpt-a-0"):
        read_recipes(tmp_path)


def test_a_file_has_one_recipe_a_cause_and_seed_with_the_base_under_it(tmp_path: Path) -> None:
    text = (
        'family = "gpt"\nbase = { lr = 0.5, clip = 2.0 }\n[[run]]\ncause = "a"\nseeds = [3, 4]\nlr = 0.25\n'
    )
    (tmp_path / "a.toml").write_text(text, encoding="utf-8")
    assert read_recipes(tmp_path) == [
        Recipe(family="gpt", cause="a", seed=seed, lr=0.25, clip=2.0) for seed in (3, 4)
    ]
