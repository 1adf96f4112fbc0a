"""The model families of the corpus, each with its task."""

from collections.abc import Callable

import torch
from torch import nn

from .layers import Shape, Transformer
from .recipe import Recipe
from .tasks import Digits, Sequences, Task, Text

Built = tuple[nn.Module, Task]


def _seed(recipe: Recipe) -> int:
    return 1000 + 10 * recipe.seed


def _language_model(recipe: Recipe, shape: Shape) -> Built:
    task = Text(_seed(recipe), batch=recipe.batch or 8, context=shape.context, noise=recipe.label_noise)
    return Transformer(shape, inputs=task.inputs, outputs=task.outputs, causal=True), task


def _gpt(recipe: Recipe) -> Built:
    return _language_model(recipe, Shape(init=recipe.init))


def _llama(recipe: Recipe) -> Built:
    return _language_model(recipe, Shape(norm="rms", rope=True, gated=True, key_heads=2, init=recipe.init))


def _llama_qknorm(recipe: Recipe) -> Built:
    shape = Shape(norm="rms", rope=True, gated=True, key_heads=2, qk_norm=True, init=recipe.init)
    return _language_model(recipe, shape)


def _deep_narrow(recipe: Recipe) -> Built:
    return _language_model(
        recipe, Shape(width=32, layers=12, heads=2, key_heads=2, rope=True, init=recipe.init)
    )


def _gpt_recall(recipe: Recipe) -> Built:
    task = Sequences(
        _seed(recipe),
        batch=recipe.batch or 24,
        length=20,
        symbols=40,
        order="recall",
        noise=recipe.label_noise,
    )
    shape = Shape(layers=2, context=40, init=recipe.init)
    return Transformer(shape, inputs=task.inputs, outputs=task.outputs, causal=True), task


def _vit(recipe: Recipe) -> Built:
    task = Digits(_seed(recipe), batch=recipe.batch or 32, side=2, noise=recipe.label_noise)
    return _classifier(Shape(context=16, init=recipe.init), task)


def _swin(recipe: Recipe) -> Built:
    task = Digits(_seed(recipe), batch=recipe.batch or 16, side=2, zoom=2, noise=recipe.label_noise)
    return _classifier(Shape(context=64, window=4, init=recipe.init), task)


def _encoder_postnorm(recipe: Recipe) -> Built:
    task = Digits(_seed(recipe), batch=recipe.batch or 32, side=2, noise=recipe.label_noise)
    return _classifier(Shape(context=16, layers=6, post_norm=True, init=recipe.init), task)


def _classifier(shape: Shape, task: Digits) -> Built:
    return Transformer(shape, inputs=task.inputs, outputs=task.outputs, pooled=True, patches=True), task


def _encoder_decoder(recipe: Recipe) -> Built:
    task = Sequences(
        _seed(recipe),
        batch=recipe.batch or 24,
        length=12,
        symbols=24,
        order=recipe.task or "reverse",
        noise=recipe.label_noise,
    )
    shape = Shape(layers=2, context=12, init=recipe.init)
    return Transformer(shape, inputs=task.inputs, outputs=task.outputs, causal=True, encoder=True), task


FAMILIES: dict[str, Callable[[Recipe], Built]] = {
    "gpt": _gpt,
    "gpt-recall": _gpt_recall,
    "llama": _llama,
    "llama-qknorm": _llama_qknorm,
    "deep-narrow": _deep_narrow,
    "vit": _vit,
    "swin": _swin,
    "encoder-postnorm": _encoder_postnorm,
    "encoder-decoder": _encoder_decoder,
}


def build(recipe: Recipe) -> Built:
    """The model and the task of a recipe; the same recipe gives both again.

    Raises:
        ValueError: there is no such family or precision.
    """
    if recipe.family not in FAMILIES:
        raise ValueError(f"family {recipe.family!r} is none of {sorted(FAMILIES)}")
    if recipe.precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision {recipe.precision!r} is none of float32 and bfloat16")
    torch.manual_seed(recipe.seed)
    model, task = FAMILIES[recipe.family](recipe)
    return model.to(getattr(torch, recipe.precision)), task
