"""Checking what a Recorder was given."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from diagnostics.attach.sampling import rows_wanted
from diagnostics.attach.site import Sites
from diagnostics.attach.traces import may_hold_attention
from diagnostics.control.controller import MODES
from diagnostics.errors import DiagnosticsError, NoAttentionError
from diagnostics.remedies.optimizers import unwrapped


def check_arguments(
    model: nn.Module, every: int, layers: str | None, config: Mapping[str, Any] | None, control: str
) -> re.Pattern[str] | None:
    """Refuses what cannot work; returns `layers` compiled."""
    if not isinstance(model, nn.Module):
        raise DiagnosticsError(f"model is a {type(model).__name__}, it must be a torch.nn.Module")
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise DiagnosticsError(
            f"every is {every!r}, it must be a whole number of at least 1: each such step is measured"
        )
    if control not in MODES:
        raise DiagnosticsError(f"control is {control!r}, it must be one of {', '.join(MODES)}")
    if config is not None and not isinstance(config, Mapping):
        raise DiagnosticsError(
            f"config is a {type(config).__name__}, it must be a mapping such as {{'lr': 3e-4}}, or None"
        )
    rows_wanted()
    if layers is None:
        return None
    try:
        pattern = re.compile(layers)
    except (re.error, TypeError) as error:
        raise DiagnosticsError(f"layers is {layers!r}, which is no regular expression: {error}") from None
    names = [name for name, _ in model.named_modules()]
    if not any(pattern.search(name) for name in names):
        some = ", ".join(repr(name) for name in names[1:6])
        raise DiagnosticsError(
            f"layers is {layers!r}, which matches no module path; paths here look like {some}"
        )
    return pattern


def check_holds_attention(model: nn.Module, sites: Sites, layers: str | None) -> None:
    """Refuses a model that cannot hold attention, unless the user named where it is.

    Raises:
        NoAttentionError: no candidate by name, and no trace of attention in names or code.
    """
    if len(sites) or layers is not None or may_hold_attention(model):
        return
    raise NoAttentionError(
        f"{type(model).__name__} holds no attention: no module or code in it speaks of attention, softmax or "
        "q and k projections. Attach to the model that does; if attention hides where names do not show it, "
        "name its module with layers='...'"
    )


def torch_optimizers(optimizer: object, model: nn.Module) -> tuple[torch.optim.Optimizer, ...]:
    """The torch optimizers inside what the user gave, checked to belong to the model.

    Raises:
        DiagnosticsError: no torch optimizer, or one over other parameters.
    """
    if optimizer is None:
        return ()
    several = isinstance(optimizer, Iterable) and not isinstance(optimizer, str | Mapping)
    given: Iterable[object] = optimizer if several else (optimizer,)  # type: ignore[assignment]
    own = {id(parameter) for parameter in model.parameters()}
    found = []
    for each in given:
        inner = unwrapped(each)
        if not isinstance(inner, torch.optim.Optimizer):
            raise DiagnosticsError(
                f"optimizer is a {type(each).__name__}, it must be a torch.optim.Optimizer (or several, or None: "
                "then update ratios are not measured)"
            )
        held = {id(parameter) for group in inner.param_groups for parameter in group["params"]}
        if not held & own:
            raise DiagnosticsError(
                f"the {type(inner).__name__} holds none of the model's parameters; give the optimizer that trains this "
                "model, made after the model was moved or wrapped"
            )
        found.append(inner)
    return tuple(found)
