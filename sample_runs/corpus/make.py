"""Makes the corpus: trains what is missing, labels all of it, packs it (`make corpus`).

    python -m sample_runs.corpus.make [--only PATTERN] [--jobs N]

A run is trained by the ordinary recorder, comes to lie in `runs/corpus/<name>` when it is finished, and is left alone
from then on while its recipe is the same. So it can be stopped at any time and called again.
"""

import argparse
import fnmatch
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from diagnostics import Recorder, open_run
from diagnostics.errors import NotARunError

from .candidates import Candidates
from .packing import gather, read, write
from .recipe import Recipe, read_recipes
from .training import Training
from .verdicts import Course, verdicts

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs" / "corpus"
TABLES = HERE / "tables"
INDEX = HERE / "index.json"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sample_runs.corpus.make", description=__doc__)
    parser.add_argument(
        "--only", default="*", metavar="PATTERN", help="runs whose names match, such as 'gpt-*'"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="processes")
    asked = parser.parse_args(arguments)
    recipes = read_recipes()
    chosen = [recipe for recipe in recipes if fnmatch.fnmatch(recipe.name, asked.only)]
    if not chosen:
        parser.error(f"no run's name matches {asked.only!r}; there are {', '.join(r.name for r in recipes)}")
    console = Console(stderr=True)
    missing = [recipe for recipe in chosen if not is_made(recipe, RUNS)]
    failed = _train_all(missing, asked.jobs, console)
    labels = pack_all(recipes, RUNS, TABLES, INDEX)
    unjudged = len(recipes) - labels.total()
    console.print(", ".join(f"{count} {label}" for label, count in labels.most_common()) or "no runs yet")
    if unjudged:
        console.print(
            f"{unjudged} of {len(recipes)} runs are not made yet, or have no sound run to be held against"
        )
    for name, told in failed.items():
        console.print(f"{name} was not made: {told}")
    sys.exit(bool(failed))


def is_made(recipe: Recipe, runs: Path) -> bool:
    """Whether the run directory is there, finished without a fault, and made with this very recipe."""
    try:
        info = open_run(runs / recipe.name).info
    except NotARunError:
        return False
    whole = info["state"] == "finished" and not info["faults"]
    return bool(whole and info["config"].get("digest") == recipe.digest)


def train(recipe: Recipe, runs: Path) -> Path:
    """Trains a recipe on one thread, beside, and puts the run where it belongs when it is finished."""
    torch.set_num_threads(1)
    # Of this process alone: two that make the same run must not write into one directory.
    run_dir = runs / f".making-{os.getpid()}" / recipe.name
    shutil.rmtree(run_dir.parent, ignore_errors=True)
    training = Training(recipe)
    candidates = Candidates(training.model, every=recipe.every)
    config = asdict(recipe) | {"digest": recipe.digest, "chance": training.task.chance}
    with Recorder(
        training.model,
        training.optimizer,
        run_dir,
        every=recipe.every,
        config=config,
        detectors=False,
        control="off",
    ) as recorder:
        for made in training.steps():
            scalars = candidates.measure(made.step)
            recorder.step(loss=made.loss, grad_norm=made.grad_norm, **scalars)
    place = runs / recipe.name
    shutil.rmtree(place, ignore_errors=True)
    run_dir.rename(place)
    run_dir.parent.rmdir()
    return place


def pack_all(recipes: Iterable[Recipe], runs: Path, tables: Path, index: Path) -> Counter[str]:
    """Labels every run that is made, or was packed before with the same recipe; writes the tables and the index.

    A run without a sound one of its kind is left out until there is one.

    Returns:
        How many runs have each label.
    """
    courses: list[Course] = []
    for recipe in recipes:
        packed = tables / f"{recipe.name}.npz"
        if is_made(recipe, runs):
            info = open_run(runs / recipe.name).info
            about = {**info["config"], "sites": info["sites"]}
            courses.append(Course(recipe, gather(runs / recipe.name), about))
        elif packed.exists():
            arrays, about = read(packed)
            if about["digest"] == recipe.digest:
                courses.append(Course(recipe, arrays, about))
    told = verdicts(courses)
    courses = [course for course in courses if course.recipe.name in told]
    # A table whose recipe is gone or was changed is no longer what the recipes say.
    for path in tables.glob("*.npz"):
        if path.stem not in told:
            path.unlink()
    for course in courses:
        label = told[course.recipe.name]
        about = {
            **course.about,
            "label": label.label,
            "onset": label.onset_step,
            "recovered": label.recovered_step,
            "covered": round(label.covered, 4),
        }
        write(tables / f"{course.recipe.name}.npz", course.arrays, about)
    rows = [
        {
            "name": course.recipe.name,
            "family": course.recipe.family,
            "cause": course.recipe.cause,
            "seed": course.recipe.seed,
            "label": told[course.recipe.name].label,
            "onset_step": told[course.recipe.name].onset_step,
            "recovered_step": told[course.recipe.name].recovered_step,
            "steps": len(course.arrays["every_step"]),
            "final_loss": _short(told[course.recipe.name].final_loss),
            "covered": _short(told[course.recipe.name].covered),
        }
        for course in courses
    ]
    lines = ",\n".join(json.dumps(row) for row in rows)
    index.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    return Counter(label.label for label in told.values())


def _short(value: float) -> float | None:
    """JSON has no infinity."""
    return round(value, 4) if abs(value) < float("inf") else None


def _train_all(recipes: list[Recipe], jobs: int, console: Console) -> dict[str, str]:
    """Trains in processes of their own; returns why some could not be made, by name."""
    failed: dict[str, str] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with bar, ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        task = bar.add_task("training the corpus", total=len(recipes))
        waiting = {pool.submit(train, recipe, RUNS): recipe for recipe in recipes}
        for done in as_completed(waiting):
            name = waiting[done].name
            if error := done.exception():
                failed[name] = f"{type(error).__name__}: {error}"
            bar.update(task, advance=1, description=name)
    return failed


if __name__ == "__main__":
    main()
