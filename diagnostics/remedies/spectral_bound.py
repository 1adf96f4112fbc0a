"""The spectral bound: no step changes a matrix by more than a fraction tau of its largest singular value.

Source: AdamW^2, Algorithm 1 of arXiv 2505.21910, applied to the whole step of any optimizer. By Weyl's
inequality sigma1(W) then grows by at most (1 + tau) a step, and sigma1(Wq^T Wk) by (1 + tau)^2. It limits the
rate of growth, not the level.

Shape suffixes: N matrices of one shape, m x n.
"""

import math
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from diagnostics.attach.site import Site
from diagnostics.border import Border, Fault
from diagnostics.errors import DiagnosticsError
from diagnostics.measure.sigma1 import largest_singular_value
from diagnostics.remedies.blocks import Block, Select, blocks_of, select_matrices
from diagnostics.remedies.optimizers import takes_closure, unwrapped

DEFAULT_TAU = 0.01
"""Rescued five of five failing small runs and harmed no healthy one; 0.003 stopped two of three from learning."""

_ACTIVE: "weakref.WeakKeyDictionary[torch.optim.Optimizer, list[SpectralBound]]" = weakref.WeakKeyDictionary()


def default_floor(rows: int, columns: int) -> float:
    """sigma1 that a matrix of this shape counts as at least: 0.01 (sqrt(m) + sqrt(n)).

    A random matrix with entries of standard deviation s has sigma1 of about s (sqrt(m) + sqrt(n)), so this is
    half of what the common normal(0, 0.02) initialisation gives: ordinary matrices are bounded by their own
    sigma1, a zero-initialised one can leave zero and reaches this size in 1 / tau steps.
    """
    return 0.01 * (math.sqrt(rows) + math.sqrt(columns))


class SpectralBound:
    """Bounds every selected matrix's step so that sigma1(dW) <= tau * max(sigma1(W), floor).

    dW is the whole step as the optimizer took it, weight decay included; a step above the bound is scaled
    down to it, any other step is left exactly as it is. Fused q, k, v projections are bounded block by block.
    A fault of the bound's own is reported once and takes it off: training goes on unbounded.

    Args:
        optimizer: any `torch.optim.Optimizer`, bounded through its step hooks; also as accelerate wraps it.
        tau: largest relative step; `inf` never fires and leaves training bit-identical.
        select: which parameters: None: all with two dimensions or more but embeddings; a module, an iterable
            of parameters, or a callable on a parameter.
        floor: smallest sigma1(W) that counts; None: `default_floor` of the block's shape.

    Raises:
        ValueError: tau or floor out of range, or nothing to bound.
    """

    name = "spectral-bound"

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        tau: float = DEFAULT_TAU,
        *,
        select: Select = None,
        floor: float | None = None,
    ) -> None:
        self._start(optimizer, tau, select, floor, None, None)

    def _start(
        self,
        given: torch.optim.Optimizer,
        tau: float,
        select: Select,
        floor: float | None,
        model: nn.Module | None,
        sites: Sequence[Site] | None,
    ) -> None:
        optimizer = unwrapped(given)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise DiagnosticsError(
                f"optimizer is a {type(given).__name__}, it must be a torch.optim.Optimizer"
            )
        if floor is not None and not (
            isinstance(floor, int | float) and floor >= 0.0 and math.isfinite(floor)
        ):
            raise DiagnosticsError(
                f"floor is {floor!r}, it must be a finite number of at least 0, or None for the default"
            )
        self.tau = tau
        self._floor = floor
        self._parameters = select_matrices(optimizer, select)
        self._blocks = blocks_of(self._parameters, model, sites)
        self._shapes = [_shape(block) for block in self._blocks]
        self._border = Border(self._give_up, owner="spectral bound", promise="training goes on unbounded")
        self._vectors: dict[tuple[str, int], Tensor] = {}
        self._before: dict[int, Tensor] = {}
        self._scales: dict[int, Tensor] = {}
        self._fired: dict[int, Tensor] = {}
        self._hardest: dict[int, Tensor] = {}
        self._steps = 0
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        self._optimizer = weakref.ref(optimizer)
        _ACTIVE.setdefault(optimizer, []).append(self)

    @classmethod
    def for_sites(
        cls, optimizer: torch.optim.Optimizer, tau: float, model: nn.Module, sites: Sequence[Site]
    ) -> Self:
        """A bound that knows the model's attention sites, and cuts fused projections where they say."""
        embeddings = {
            id(module.weight)
            for module in model.modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        bound = cls.__new__(cls)
        bound._start(optimizer, tau, lambda p: id(p) not in embeddings, None, model, sites)  # noqa: SLF001 - its own
        return bound

    @property
    def tau(self) -> float:
        return self._tau

    @tau.setter
    def tau(self, tau: float) -> None:
        if not isinstance(tau, int | float) or isinstance(tau, bool) or not tau > 0.0:
            raise DiagnosticsError(
                f"tau is {tau!r}, it must be a number above 0, such as 0.01 (inf switches the bound off)"
            )
        self._tau = float(tau)

    @property
    def matrices(self) -> int:
        """How many matrices are bounded, each block of a fused projection counted."""
        return len(self._blocks)

    def remove(self) -> None:
        """Takes the bound off; safe to call twice, between two steps."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._let_go()

    def _let_go(self) -> None:
        self._before, self._scales = {}, {}
        optimizer = self._optimizer()
        if optimizer is not None and self in _ACTIVE.get(optimizer, []):
            _ACTIVE[optimizer].remove(self)

    @property
    def fault(self) -> Fault | None:
        """What made the bound take itself off, None where nothing did."""
        return self._border.faults[0] if self._border.faults else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def scale_of(self, parameter: nn.Parameter) -> Tensor | None:
        """What the last step of a parameter was multiplied by (0-d; the smallest of its blocks), None if not bounded."""
        return self._scales.get(id(parameter))

    def summary(self) -> dict[str, float | int]:
        """How often and how hard the bound fired since it was armed; fetches from the device."""
        fired = [int(count) for count in self._fired.values()]
        hardest = [float(scale) for scale in self._hardest.values()]
        return {
            "tau": self._tau,
            "matrices": self.matrices,
            "steps": self._steps,
            "fired_share": sum(fired) / (len(self._blocks) * self._steps) if self._steps else 0.0,
            "smallest_scale": min(hardest, default=1.0),
        }

    def state_dict(self) -> dict[str, Any]:
        """tau, floor, counters and the power iteration's vectors."""
        return {
            "tau": self._tau,
            "floor": self._floor,
            "steps": self._steps,
            "shapes": list(self._shapes),
            "vectors": {key: vector.clone() for key, vector in self._vectors.items()},
            "fired": dict(self._fired),
            "hardest": dict(self._hardest),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave.

        tau and floor always; the counters and vectors only where the matrices are the same ones, cut the same
        way: they are found anew in a few steps.
        """
        self.tau = state["tau"]
        self._floor = state["floor"]
        if [tuple(shape) for shape in state["shapes"]] != self._shapes:
            return
        self._steps = state["steps"]
        self._vectors = dict(state["vectors"])
        self._fired, self._hardest = dict(state["fired"]), dict(state["hardest"])

    def _before_step(self, _: object, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self._border.run(self._remember, args, kwargs)

    def _after_step(self, *_: object) -> None:
        self._border.run(self._bound)
        if self._border.broken:
            # torch walks the table of post-hooks now, so this one has to stay until `remove`; it does nothing.
            self._handles[0].remove()

    def _give_up(self, _: Fault) -> None:
        self._let_go()

    @torch.no_grad()
    def _remember(self, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        self._before, self._scales = {}, {}
        if math.isinf(self._tau):
            return
        # A closure makes the gradients inside the step: which parameters it moves is known only afterwards.
        closure = takes_closure(args, kwargs)
        self._before = {id(p): p.detach().clone() for p in self._parameters if closure or p.grad is not None}

    @torch.no_grad()
    def _bound(self) -> None:
        if not self._before:
            return
        self._steps += 1
        for shape, members in self._groups():
            self._bound_group(shape, members)
        self._before.clear()

    def _groups(self) -> list[tuple[tuple[int, int], list[int]]]:
        """The blocks that stepped, by shape, device and dtype: all of one group make one batch."""
        groups: dict[tuple[tuple[int, int], torch.device, torch.dtype], list[int]] = {}
        for index, (shape, block) in enumerate(zip(self._shapes, self._blocks, strict=True)):
            parameter = block.parameter
            if id(parameter) in self._before:
                # Asked at each step: a model may be moved, whole or in part, after it was armed.
                groups.setdefault((shape, parameter.device, parameter.dtype), []).append(index)
        return [(shape, members) for (shape, _, _), members in groups.items()]

    def _bound_group(self, shape: tuple[int, int], members: list[int]) -> None:
        blocks = [self._blocks[index] for index in members]
        before_nmn = torch.stack([block.of(self._before[id(block.parameter)]) for block in blocks])
        after_nmn = torch.stack([block.of(block.parameter.detach()) for block in blocks])
        wide = torch.promote_types(before_nmn.dtype, torch.float32)
        update_nmn = after_nmn.to(wide) - before_nmn.to(wide)
        weight = largest_singular_value(
            before_nmn.to(wide), self._start_vectors("weight", members, update_nmn)
        )
        update = largest_singular_value(update_nmn, self._start_vectors("update", members, update_nmn))
        floor = default_floor(*shape) if self._floor is None else self._floor
        limit_n = self._tau * weight.value_b.clamp_min(floor)
        # An iterate never exceeds the true value; its residual covers what may be missing.
        sigma1_n = update.value_b * (1.0 + update.residual_b)
        scale_n = torch.where(sigma1_n > limit_n, limit_n / sigma1_n, torch.ones_like(sigma1_n))
        bounded_nmn = (before_nmn.to(wide) + scale_n[:, None, None] * update_nmn).to(after_nmn.dtype)
        # Chosen on the device: a step within the bound keeps its own bits, and nothing waits for the host.
        result_nmn = torch.where((scale_n < 1.0)[:, None, None], bounded_nmn, after_nmn)
        for position, (index, block) in enumerate(zip(members, blocks, strict=True)):
            block.put(block.parameter.data, result_nmn[position])
            self._vectors["weight", index] = weight.vector_bn[position]
            self._vectors["update", index] = update.vector_bn[position]
            self._count(index, block, scale_n[position])

    def _count(self, index: int, block: Block, scale: Tensor) -> None:
        key = id(block.parameter)
        self._scales[key] = torch.minimum(self._scales[key], scale) if key in self._scales else scale
        fired = (scale < 1.0).long()
        self._fired[index] = self._fired[index] + fired if index in self._fired else fired
        self._hardest[index] = torch.minimum(self._hardest[index], scale) if index in self._hardest else scale

    def _start_vectors(self, kind: str, members: list[int], like: Tensor) -> Tensor | None:
        vectors = [self._vectors.get((kind, index)) for index in members]
        known = [vector.to(like) for vector in vectors if vector is not None]
        return torch.stack(known) if len(known) == len(vectors) else None


def active_bounds(optimizer: torch.optim.Optimizer) -> Sequence[SpectralBound]:
    """The bounds now armed on an optimizer, for the recorder's `scale` column."""
    return tuple(_ACTIVE.get(optimizer, ()))


def _shape(block: Block) -> tuple[int, int]:
    rows, columns = block.of(block.parameter.detach()).shape
    return rows, columns
