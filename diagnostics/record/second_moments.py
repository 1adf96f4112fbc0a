"""Reading the second moments that Adam and its kin keep, next to the gradients they were made of."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diagnostics.measure.adam_rms import Moment


def second_moments(optimizer: torch.optim.Optimizer) -> list[Moment]:
    """What an optimizer that has just stepped holds of its parameters; empty where it keeps no such thing.

    Left out is what has no plain elementwise average of squared gradients: parameters without a gradient or with a
    sparse one, quantised and sharded states, factored ones, optimizers with other names for them, and one whose
    gradients a GradScaler has left scaled. Nothing waits for a device, and nothing is put into the state.
    """
    # A fused optimizer under a GradScaler takes scaled gradients; whether they are still so now, only the device knows.
    if getattr(optimizer, "grad_scale", None) is not None:
        return []
    found = []
    for group in optimizer.param_groups:
        beta2, eps = _beta2(group), group.get("eps")
        if beta2 is None or not isinstance(eps, float | int):
            continue
        for parameter in group["params"]:
            # The state is a defaultdict: to index it would put an entry there.
            state = optimizer.state.get(parameter)
            if not isinstance(state, Mapping) or parameter.grad is None:
                continue
            moment = _moment(parameter.grad, state, state.get("step", group.get("step")), beta2, float(eps))
            found += [] if moment is None else [moment]
    return found


def _moment(
    gradient: Tensor, state: Mapping[str, Any], step: object, beta2: float, eps: float
) -> Moment | None:
    # With amsgrad the step is divided by the largest average so far.
    second = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
    if not (_is_plain(gradient) and isinstance(second, Tensor) and _is_plain(second)):
        return None
    if second.shape != gradient.shape or second.device != gradient.device:
        return None
    if isinstance(step, Tensor) and step.device.type == "cpu" and step.numel() == 1:
        step = step.item()
    if isinstance(step, Tensor):
        return (
            Moment(gradient, second, step, beta2, eps)
            if step.ndim == 0 and step.device == gradient.device
            else None
        )
    if not isinstance(step, float | int) or step <= 0:
        return None
    return Moment(gradient, second, float(step), beta2, eps)


def _is_plain(values: Tensor) -> bool:
    """Whether entries can be read one by one: a quantised or sharded tensor is a class of its own."""
    return (
        type(values) in (Tensor, nn.Parameter)
        and values.layout is torch.strided
        and values.is_floating_point()
        and values.device.type != "meta"
    )


def _beta2(group: Mapping[str, Any]) -> float | None:
    betas = group.get("betas")
    if not isinstance(betas, tuple | list) or len(betas) != 2:  # noqa: PLR2004 - of both moments
        return None
    beta2 = betas[1]
    if isinstance(beta2, Tensor):
        # A beta on a device is there to be changed under a captured graph; to read it would wait.
        beta2 = beta2.item() if beta2.device.type == "cpu" and beta2.numel() == 1 else math.nan
    return float(beta2) if isinstance(beta2, float | int) and 0.0 <= beta2 < 1.0 else None
