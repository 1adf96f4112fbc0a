"""Watching one optimizer step: weights before it, the update it made, the gradients it used.

Shape suffixes: m x n one matrix; convolutions are flattened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diagnostics.measure.adam_rms import adam_rms
from diagnostics.record.second_moments import second_moments
from diagnostics.remedies.optimizers import takes_closure
from diagnostics.remedies.spectral_bound import active_bounds

WATCHED_BYTES = 2**30
"""Largest copy of weights held during a measured step; matrices beyond it are named as not observed."""


@dataclass(frozen=True)
class CapturedUpdate:
    """One matrix's step: weight before it and update, (m, n), and what the spectral bound multiplied it by."""

    parameter: str
    before_mn: Tensor
    update_mn: Tensor
    scale: Tensor


class UpdateWatch:
    """Compares the watched matrices before and after the optimizer steps of a measured step.

    Args:
        optimizers: torch optimizers, unwrapped.
        model: whose parameters are watched, under its names.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], model: nn.Module) -> None:
        self._optimizers = tuple(optimizers)
        self._model = model
        self._names: dict[int, str] = {}
        self._handles: list[RemovableHandle] = []
        self._before: dict[str, tuple[nn.Parameter, Tensor]] = {}
        self._closure_given = False
        self.grad_norm: Tensor | None = None
        self.adam_rms: Tensor | None = None
        self.left_out: dict[str, str] = {}

    def arm(self, contained: Callable[..., bool]) -> None:
        """From now on, the next optimizer steps are watched."""
        if not self._handles:
            # Named anew each time, so that parameters added or replaced meanwhile are known.
            self._names = {id(parameter): name for name, parameter in self._model.named_parameters()}
            self._handles = [
                handle
                for optimizer in self._optimizers
                for handle in (
                    optimizer.register_step_pre_hook(partial(self._before_step, contained)),
                    optimizer.register_step_post_hook(partial(self._after_step, contained)),
                )
            ]

    def disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._before, self.grad_norm, self.adam_rms = {}, None, None

    def _before_step(
        self,
        contained: Callable[..., bool],
        optimizer: torch.optim.Optimizer,
        args: tuple[object, ...],
        kwargs: dict[str, object],
    ) -> None:
        self._closure_given = takes_closure(args, kwargs)
        contained(self._remember, optimizer)

    def _after_step(
        self, contained: Callable[..., bool], optimizer: torch.optim.Optimizer, *_: object
    ) -> None:
        if self._closure_given:
            contained(self._add_grad_norm, optimizer)
        contained(self._add_adam_rms, optimizer)

    @torch.no_grad()
    def _remember(self, optimizer: torch.optim.Optimizer) -> None:
        # A closure makes the gradients inside the step: before it there are none, or those of the last step.
        if not self._closure_given:
            self._add_grad_norm(optimizer)
        parameters = [
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None or (self._closure_given and p.requires_grad)
        ]
        named = [(self._names[id(p)], p) for p in parameters if id(p) in self._names and _is_matrix(p)]
        held = sum(before.numel() * before.element_size() for _, before in self._before.values())
        for name, parameter in named:
            if name in self._before:
                continue  # a second optimizer step within the recorder's step: the first weight counts
            held += parameter.numel() * parameter.element_size()
            if held > WATCHED_BYTES:
                self.left_out[name] = (
                    f"its copy would exceed the {WATCHED_BYTES >> 20} MiB held during a measured step"
                )
                continue
            self._before[name] = (parameter, parameter.detach().clone())

    @torch.no_grad()
    def _add_grad_norm(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [
            p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        # A fused optimizer under a GradScaler gets gradients that are still scaled; their norm would be none.
        if getattr(optimizer, "grad_scale", None) is not None or not gradients:
            return
        values = [g.coalesce().values() if g.is_sparse else g for g in gradients]
        by_device: dict[torch.device, list[Tensor]] = {}
        for value in values:
            by_device.setdefault(value.device, []).append(value)
        norms = [
            norm.to(values[0].device, torch.float64)
            for group in by_device.values()
            for norm in torch._foreach_norm(group)  # noqa: SLF001 - as torch's own clip_grad_norm_ does
        ]
        total = torch.linalg.vector_norm(torch.stack(norms))
        self.grad_norm = total if self.grad_norm is None else torch.hypot(self.grad_norm, total)

    def _add_adam_rms(self, optimizer: torch.optim.Optimizer) -> None:
        largest = adam_rms(second_moments(optimizer))
        if largest is not None:
            before = self.adam_rms
            # Of several optimizers, or steps within the recorder's step, the largest counts; a NaN stays.
            self.adam_rms = largest if before is None else torch.maximum(before, largest.to(before))

    @torch.no_grad()
    def capture(self) -> list[CapturedUpdate]:
        """The updates made since `arm`, as copies; empty where no optimizer stepped."""
        captured = []
        for name, (parameter, before) in self._before.items():
            if parameter.shape != before.shape or parameter.device != before.device:
                continue
            wide = torch.promote_types(before.dtype, torch.float32)
            update = _as_matrix(parameter.detach().to(wide) - before.to(wide))
            captured.append(CapturedUpdate(name, _as_matrix(before), update, self._scale(parameter)))
        return captured

    def _scale(self, parameter: nn.Parameter) -> Tensor:
        scales = [
            scale
            for optimizer in self._optimizers
            for bound in active_bounds(optimizer)
            if (scale := bound.scale_of(parameter)) is not None
        ]
        return torch.stack(scales).prod() if scales else torch.ones((), device=parameter.device)


def _is_matrix(parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and parameter.is_floating_point() and min(_matrix_shape(parameter)) > 0  # noqa: PLR2004 - a matrix


def _matrix_shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight[0].numel() if weight.shape[0] else 0


def _as_matrix(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0], -1)
