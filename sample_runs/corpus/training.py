"""One recipe, trained step by step: its model on its task, with what goes wrong at its steps."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from .families import build
from .layers import Attention
from .recipe import Recipe
from .tasks import IGNORED, Batch, Task

LAST_NOT_FINITE = 20
"""A run ends when its last so many losses were not finite."""


class Trained(NamedTuple):
    """A step that was just made."""

    step: int
    loss: float
    grad_norm: float


class Training:
    """A model, its optimizer and its task, made of a recipe; `steps()` trains."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.model, self.task = build(recipe)
        of_attention = [
            projection.weight
            for module in self.model.modules()
            if isinstance(module, Attention)
            for projection in (module.q_proj, module.k_proj)
        ]
        known = {id(weight) for weight in of_attention}
        others = [weight for weight in self.model.parameters() if id(weight) not in known]
        # The others first: the recorder's `lr` is that of the first group.
        groups: list[dict[str, Any]] = [{"params": others}, {"params": of_attention}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=recipe.lr,
            betas=(0.9, recipe.beta2),
            weight_decay=recipe.weight_decay,
        )
        self._chaos = torch.Generator().manual_seed(recipe.seed)

    def steps(self) -> Iterator[Trained]:
        """Trains, and hands out each step behind its `optimizer.step()`; ends early where the loss is lost."""
        recipe, not_finite = self.recipe, 0
        for step in range(recipe.steps):
            self._set_optimizer(step)
            x, source, target = spoiled(recipe, step, self.task.next(), self.task, self._chaos)
            if x.is_floating_point():
                x = x.to(getattr(torch, recipe.precision))
            logits: Tensor = self.model(x) if source is None else self.model(x, source)
            loss = functional.cross_entropy(
                logits.flatten(0, -2).float(), target.flatten(), ignore_index=IGNORED
            )
            self.optimizer.zero_grad()
            scale = recipe.scale_by if 0 <= recipe.scale_from <= step else 1.0
            (scale * loss).backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip or math.inf)
            self.optimizer.step()
            value = loss.item()
            yield Trained(step, value, norm.item())
            not_finite = 0 if math.isfinite(value) else not_finite + 1
            if not_finite == LAST_NOT_FINITE:
                return

    def _set_optimizer(self, step: int) -> None:
        recipe = self.recipe
        if step == recipe.resume_at:
            self._forget_moments()
        others, of_attention = self.optimizer.param_groups
        others["lr"] = of_attention["lr"] = learning_rate(recipe, step)
        if step >= recipe.qk_from:
            of_attention["lr"] *= _reached(recipe.qk_lr, step - recipe.qk_from, recipe.qk_over)
            if recipe.qk_decay >= 0:
                of_attention["weight_decay"] = recipe.qk_decay

    def _forget_moments(self) -> None:
        if not self.recipe.resume_keeps_count:
            self.optimizer.state.clear()
        for state in self.optimizer.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()


def learning_rate(recipe: Recipe, step: int) -> float:
    """The learning rate of a step, faults included.

    Raises:
        ValueError: there is no such schedule.
    """
    match recipe.schedule:
        case "cosine":
            course = step / recipe.steps
        case "restarts":
            course = 3 * step / recipe.steps % 1.0
        case "constant":
            course = 0.0
        case other:
            raise ValueError(f"schedule {other!r} is none of cosine, restarts and constant")
    rate = recipe.lr * (0.1 + 0.45 * (1.0 + math.cos(math.pi * course)))
    if recipe.warmup:
        rate *= min(1.0, (step + 1) / recipe.warmup)
    if 0 <= recipe.lr_from <= step:
        rate *= _reached(recipe.lr_by, step - recipe.lr_from, recipe.lr_over)
    if 0 <= recipe.resume_at <= step:
        rate *= recipe.resume_by
    return rate


def _reached(factor: float, since: int, over: int) -> float:
    """What has been reached of a factor, `since` steps behind the first of `over`."""
    reached: float = factor ** min(1.0, (since + 1) / over)
    return reached


def spoiled(recipe: Recipe, step: int, batch: Batch, task: Task, chaos: torch.Generator) -> Batch:
    """The batch as it is, or a bad one where the recipe wants one at this step."""
    x, source, target = batch
    if not recipe.bad_from <= step < recipe.bad_from + recipe.bad_steps:
        return batch
    if x.is_floating_point():
        x = 20.0 * torch.randn(x.shape, generator=chaos)
    else:
        x = torch.full_like(x, int(torch.randint(0, task.inputs - 1, (1,), generator=chaos)))
    drawn = torch.randint(0, task.outputs - 1, target.shape, generator=chaos)
    return x, source, torch.where(target == IGNORED, target, drawn)
