"""What sets a run of the corpus apart, as its file in `recipes/` says it."""

import hashlib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """All that a run depends on; steps count from 0, and a step of -1 never comes.

    Attributes:
        family: the model and its task, one of `families.FAMILIES`.
        cause: what the run is about, in a word or two.
        seed: of the weights, the batches and the noise.
        steps: how many are trained.
        every: steps between two measured ones.
        batch: sequences a batch; 0: the family's own.
        task: which of the family's tasks; empty: its first.
        lr: peak learning rate of AdamW.
        warmup: steps of linear warmup.
        schedule: `cosine` to a tenth at the end, `constant`, or `restarts`: three cosines, each from the peak.
        beta2: decay of AdamW's second moments.
        weight_decay: AdamW's.
        clip: the gradient norm is clipped at this; 0: not clipped.
        init: factor on the initial query and key weights.
        precision: `float32`, or `bfloat16` for weights, gradients and all.
        label_noise: share of the targets that are drawn evenly from all classes.
        lr_from: step from which the learning rate is multiplied by `lr_by`, reached over `lr_over` steps.
        bad_from: first of `bad_steps` batches in a row of one repeated token, or of loud noise for images, each
            with random targets.
        resume_at: step at which the optimizer forgets its moments, as after a resume without its state; the
            learning rate is `resume_by` times its schedule from there on. The process goes on: what a real resume
            does to the run directory is tested elsewhere.
        resume_keeps_count: at `resume_at` the moments are forgotten, but not how many steps they were gathered over, so that Adam
            corrects them too little: second moments that are too small for many steps.
        scale_from: step from which the loss that is derived is `scale_by` times the loss, as where a mean over
            tokens becomes a sum: AdamW's second moments are stale then. The loss on record is the plain one.
        qk_lr: factor on the learning rate of the query and key weights alone, from step `qk_from` on, reached over
            `qk_over` steps.
        qk_decay: weight decay of the query and key weights alone, from step `qk_from` on; -1: as all others.
    """

    family: str
    cause: str
    seed: int
    steps: int = 500
    every: int = 5
    batch: int = 0
    task: str = ""
    lr: float = 2e-3
    warmup: int = 50
    schedule: str = "cosine"
    beta2: float = 0.999
    weight_decay: float = 0.1
    clip: float = 1.0
    init: float = 1.0
    precision: str = "float32"
    label_noise: float = 0.0
    lr_from: int = -1
    lr_by: float = 1.0
    lr_over: int = 1
    bad_from: int = -1
    bad_steps: int = 0
    resume_at: int = -1
    resume_by: float = 1.0
    resume_keeps_count: bool = False
    scale_from: int = -1
    scale_by: float = 1.0
    qk_from: int = 0
    qk_over: int = 1
    qk_lr: float = 1.0
    qk_decay: float = -1.0

    @property
    def name(self) -> str:
        return f"{self.family}-{self.cause}-{self.seed}"

    @property
    def digest(self) -> str:
        """Of all that the run depends on here; a run directory made with another is made again."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def read_recipes(folder: Path = RECIPES) -> list[Recipe]:
    """All recipes of the files in a folder, in the order of the files' names.

    A file has the `family`, a table `base` of what its runs have in common, and one table `run` a cause, with
    `seeds` and what it sets differently.

    Raises:
        ValueError: a file says what a recipe does not know, or two recipes have one name.
    """
    recipes = [recipe for path in sorted(folder.glob("*.toml")) for recipe in _recipes_in(path)]
    names = [recipe.name for recipe in recipes]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{folder}: {names.count(name)} recipes have the name {name}; a cause comes once a family"
            )
    return recipes


def _recipes_in(path: Path) -> Iterator[Recipe]:
    told = tomllib.loads(path.read_text(encoding="utf-8"))
    base: dict[str, Any] = told.get("base", {})
    for run in told["run"]:
        settings = base | run
        seeds = settings.pop("seeds")
        known = {field.name for field in fields(Recipe)}
        if unknown := set(settings) - known:
            raise ValueError(f"{path}: {sorted(unknown)} in {run['cause']!r}: a recipe knows {sorted(known)}")
        for seed in seeds:
            yield Recipe(family=told["family"], seed=seed, **settings)
