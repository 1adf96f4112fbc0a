"""A tiny recipe, trained, packed, labelled and read again."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diagnostics import open_run
from sample_runs.corpus.families import FAMILIES, build
from sample_runs.corpus.labels import HEALTHY, NEVER
from sample_runs.corpus.make import is_made, pack_all, train
from sample_runs.corpus.packing import COLUMNS, gather, read, rounded, write
from sample_runs.corpus.recipe import Recipe
from sample_runs.corpus.tasks import IGNORED, Sequences, Text
from sample_runs.corpus.training import Training, learning_rate

TINY = Recipe(family="gpt-recall", cause="tiny", seed=0, steps=22, batch=4, lr=1e-2, warmup=0)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    train(TINY, folder)
    return folder


def test_the_frames_of_a_packed_run_are_its_measured_steps_and_its_last(runs: Path) -> None:
    arrays = gather(runs / TINY.name)
    assert arrays["steps"].tolist() == [0, 5, 10, 15, 20, 21]
    assert arrays["ends"].tolist() == [1, 6, 11, 16, 21, 22]
    assert arrays["every_step"].tolist() == list(range(22))
    assert len(json.loads(str(arrays["heads"]))) == 8
    for prefix in ("attention", "spectra"):
        for name in COLUMNS[prefix]:
            values = arrays[f"{prefix}.{name}"]
            assert values.shape == (6, 8)
            assert np.isfinite(values[:5]).all(), name
            assert np.isnan(values[5]).all(), "the last frame is not a measured one"
    assert arrays["updates.ratio"].shape == (6, len(json.loads(str(arrays["parameters"]))))
    for name in ("lr", "grad_norm"):
        assert np.isfinite(arrays[f"scalars.{name}"]).all()


def test_what_is_packed_is_what_was_recorded(runs: Path) -> None:
    arrays = gather(runs / TINY.name)
    frame = open_run(runs / TINY.name).attention(start_step=10, end_step=10)
    heads = [tuple(key) for key in json.loads(str(arrays["heads"]))]
    for row in frame.to_dict("records"):
        column = heads.index((row["layer"], row["head"]))
        assert arrays["attention.max_logit"][2, column] == pytest.approx(row["max_logit"], rel=2**-11)
        assert arrays["attention.entropy"][2, column] == pytest.approx(row["entropy"], rel=2**-11)


def test_the_candidates_are_measured_beside(runs: Path) -> None:
    arrays = gather(runs / TINY.name)
    for name in ("adam_rms", "qk_update_rank", "kurtosis"):
        assert np.isfinite(arrays[f"scalars.{name}"]).sum() >= 4, name


def test_packing_and_reading_gives_the_same_and_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    arrays = gather(runs / TINY.name)
    write(tmp_path / "a.npz", arrays, {"label": "healthy"})
    again, about = read(tmp_path / "a.npz")
    assert about == {"label": "healthy"}
    assert set(again) == set(arrays)
    for name, values in arrays.items():
        np.testing.assert_array_equal(again[name], values)
        assert again[name].dtype == values.dtype
    write(tmp_path / "b.npz", again, about)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.npz", "b.npz"]


def test_a_made_run_is_known_by_its_recipe_and_nothing_else_is_left(runs: Path) -> None:
    assert is_made(TINY, runs)
    assert [path.name for path in runs.iterdir()] == [TINY.name]
    assert not is_made(Recipe(family="gpt-recall", cause="tiny", seed=0, steps=22, batch=4), runs)
    assert not is_made(Recipe(family="gpt-recall", cause="another", seed=0), runs)


def test_a_run_whose_recorder_broke_or_that_was_cut_off_is_made_again(runs: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(runs / TINY.name, tmp_path / TINY.name)
    manifest = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    for broken in ({"faults": [{"where": "here"}]}, {"state": "crashed"}):
        (run_dir / "run.json").write_text(json.dumps(manifest | broken), encoding="utf-8")
        assert not is_made(TINY, tmp_path)
    train(TINY, tmp_path)
    assert is_made(TINY, tmp_path)
    np.testing.assert_array_equal(
        gather(run_dir)["attention.entropy"], gather(runs / TINY.name)["attention.entropy"]
    )


def test_runs_are_labelled_against_the_sound_ones_of_their_kind_made_or_packed(
    runs: Path, tmp_path: Path
) -> None:
    tables, index = tmp_path / "tables", tmp_path / "index.json"
    # 22 steps are too few for recall: alone, the run has nothing to be held against.
    assert pack_all([TINY], runs, tables, index) == {}
    sound = replace(TINY, cause="sound")
    arrays = gather(runs / TINY.name) | {"losses": np.linspace(4.0, 0.0, 22, dtype=np.float32)}
    about = open_run(runs / TINY.name).info["config"] | {"cause": "sound", "digest": sound.digest}
    write(tables / f"{sound.name}.npz", arrays, about)
    assert pack_all([sound, TINY], runs, tables, index) == {HEALTHY: 1, NEVER: 1}
    _, about = read(tables / f"{TINY.name}.npz")
    assert (about["label"], about["family"], about["sites"][0]["heads"]) == (NEVER, "gpt-recall", 4)
    # The last 20 losses of the line have the median 1.81. Half of what lies between chance, 3.69, and that is had at
    # 2.75, which the line passes at step 6.6; the median of 11 lags by 5.
    assert about["onset"] == 12
    listed = json.loads(index.read_text(encoding="utf-8"))
    assert [(row["name"], row["label"], row["onset_step"]) for row in listed] == [
        (sound.name, HEALTHY, None),
        (TINY.name, NEVER, 12),
    ]


def test_tables_are_labelled_anew_without_run_directories_and_go_with_their_recipes(
    runs: Path, tmp_path: Path
) -> None:
    tables, index = tmp_path / "tables", tmp_path / "index.json"
    arrays = gather(runs / TINY.name) | {"losses": np.linspace(4.0, 0.0, 22, dtype=np.float32)}
    write(tables / f"{TINY.name}.npz", arrays, open_run(runs / TINY.name).info["config"])
    nowhere = tmp_path / "nowhere"
    assert pack_all([TINY], nowhere, tables, index) == {HEALTHY: 1}
    packed, listed = (tables / f"{TINY.name}.npz").read_bytes(), index.read_text(encoding="utf-8")
    assert pack_all([TINY], nowhere, tables, index) == {HEALTHY: 1}
    assert (tables / f"{TINY.name}.npz").read_bytes() == packed
    assert index.read_text(encoding="utf-8") == listed
    assert pack_all([replace(TINY, lr=1.0)], nowhere, tables, index) == {}
    assert list(tables.iterdir()) == []


def test_rounding_keeps_ten_bits_and_what_is_not_finite() -> None:
    values = np.array([1.0, 1.0 + 2**-10, 1.0 + 2**-12, 3.3e38, np.nan, np.inf, -0.1], dtype=np.float32)
    found = rounded(values)
    assert found[:3].tolist() == [1.0, 1.0 + 2**-10, 1.0]
    assert np.isnan(found[4])
    assert np.isposinf(found[5])
    np.testing.assert_allclose(found[[3, 6]], values[[3, 6]], rtol=2**-11)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_makes_a_step_and_its_loss_starts_near_chance_or_above(family: str) -> None:
    training = Training(Recipe(family=family, cause="one-step", seed=1, steps=1, batch=2))
    (made,) = list(training.steps())
    assert 0.5 * training.task.chance < made.loss < 3 * training.task.chance
    assert np.isfinite(made.grad_norm)


def test_the_same_recipe_trains_the_same_losses() -> None:
    short = replace(TINY, steps=5, bad_from=2, bad_steps=2, label_noise=0.5)
    first = [made.loss for made in Training(short).steps()]
    assert len(first) == 5
    assert [made.loss for made in Training(short).steps()] == first
    assert [made.loss for made in Training(replace(short, seed=1)).steps()] != first


def test_unknown_families_precisions_and_schedules_are_named() -> None:
    with pytest.raises(ValueError, match="mamba"):
        build(Recipe(family="mamba", cause="", seed=0))
    with pytest.raises(ValueError, match="float8"):
        build(Recipe(family="gpt", cause="", seed=0, precision="float8"))
    with pytest.raises(ValueError, match="linear"):
        learning_rate(Recipe(family="gpt", cause="", seed=0, schedule="linear"), 0)


def test_the_learning_rate_follows_its_schedule_and_its_faults() -> None:
    plain = Recipe(family="gpt", cause="", seed=0, lr=1.0, warmup=0, steps=100)
    assert learning_rate(plain, 0) == pytest.approx(1.0)
    assert learning_rate(plain, 50) == pytest.approx(0.55)
    raised = Recipe(
        family="gpt",
        cause="",
        seed=0,
        lr=1.0,
        warmup=0,
        schedule="constant",
        lr_from=10,
        lr_by=16.0,
        lr_over=4,
    )
    assert [learning_rate(raised, step) for step in (9, 10, 11, 13, 50)] == pytest.approx([1, 2, 4, 16, 16])
    resumed = Recipe(
        family="gpt", cause="", seed=0, lr=1.0, warmup=10, schedule="constant", resume_at=20, resume_by=3.0
    )
    assert [learning_rate(resumed, step) for step in (0, 19, 20)] == pytest.approx([0.1, 1.0, 3.0])


def test_the_query_and_key_weights_alone_get_their_own_rate() -> None:
    recipe = Recipe(
        family="gpt-recall", cause="", seed=0, steps=3, batch=2, qk_from=2, qk_lr=50.0, qk_decay=7.0
    )
    training = Training(recipe)
    list(training.steps())
    others, of_attention = training.optimizer.param_groups
    assert of_attention["lr"] == pytest.approx(50.0 * others["lr"])
    assert (of_attention["weight_decay"], others["weight_decay"]) == (7.0, 0.1)
    names = {id(value): name for name, value in training.model.named_parameters()}
    assert {names[id(value)].split(".")[-2] for value in of_attention["params"]} == {"q_proj", "k_proj"}
    assert len(of_attention["params"]) == 4


def test_a_resume_that_keeps_the_count_steps_as_adams_formula_says() -> None:
    def sizes(*, keeps: bool) -> float:
        recipe = Recipe(
            family="gpt-recall",
            cause="",
            seed=0,
            steps=9,
            batch=2,
            resume_at=8,
            resume_keeps_count=keeps,
            beta2=0.99,
            weight_decay=0.0,
        )
        training = Training(recipe)
        weights = [weight.detach().clone() for weight in training.model.parameters()]
        for made in training.steps():
            if made.step == recipe.resume_at - 1:
                weights = [weight.detach().clone() for weight in training.model.parameters()]
        return max(
            (after.detach() - before).abs().max().item()
            for after, before in zip(training.model.parameters(), weights, strict=True)
        )

    # With a count of 9, m is divided by 1 - 0.9^9 and v by 1 - 0.99^9; with a count of 1, by 0.1 and 0.01.
    expected = (0.1 / (1 - 0.9**9)) / (0.01 / (1 - 0.99**9)) ** 0.5
    assert sizes(keeps=True) / sizes(keeps=False) == pytest.approx(expected, rel=1e-3)


def test_recall_asks_for_the_second_showing_alone() -> None:
    x, source, target = Sequences(0, batch=3, length=6, symbols=5, order="recall").next()
    assert source is None
    assert (target[:, :5] == IGNORED).all()
    assert (target[:, 5:] == x[:, :6]).all()


def test_chance_is_the_entropy_of_the_targets() -> None:
    assert Sequences(0, batch=1, length=4, symbols=8, order="reverse").chance == pytest.approx(np.log(8))
    noisy = Text(0, batch=64, context=64, noise=1.0)
    assert noisy.chance == pytest.approx(np.log(127))
    plain = Text(0, batch=400, context=64)
    _, _, target = plain.next()
    share = np.bincount(target.flatten().numpy()) / target.numel()
    assert plain.chance == pytest.approx(-(share[share > 0] * np.log(share[share > 0])).sum(), abs=0.1)
