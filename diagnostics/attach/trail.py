"""From q k^T to the softmax that makes attention of it, in models that write attention out.

Every product of two activations may be the logits of an attention. It is followed by identity through
scaling, soft caps, biases, masks and casts to a softmax over its last dimension: that softmax's input is what
the model really computed, whatever lies in between.

Shape suffixes: B sequences, H query heads, T query rows, S keys, K head size.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.attach.calls import AttentionCall, UnsupportedCallError

PRODUCTS: frozenset[Callable[..., Any]] = frozenset(
    {
        torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm,
        torch.baddbmm, torch.Tensor.baddbmm, torch.einsum,
    }
)  # fmt: skip
SOFTMAXES: frozenset[Callable[..., Any]] = frozenset(
    {torch.softmax, torch.Tensor.softmax, functional.softmax}
)
_SUBTRACTIONS = frozenset({torch.sub, torch.Tensor.sub, torch.Tensor.__sub__, torch.subtract})
_ADDITIONS = frozenset(
    {
        torch.add,
        torch.Tensor.add,
        torch.Tensor.__add__,
        torch.Tensor.add_,
        torch.Tensor.__iadd__,
        torch.Tensor.__radd__,
    }
)
_TANHS = frozenset({torch.tanh, torch.Tensor.tanh, functional.tanh})
_MATRIX = 2
_HIDDEN = -1e4


@dataclass(frozen=True)
class Origin:
    """Where logits come from.

    Attributes:
        q: queries, (..., T, K).
        k: keys, (..., S, K).
        shift: what was subtracted from each row on the way (to keep exp in range), None: nothing.
        flags: `softcap`, `bias`, `sink`, as seen on the way.
    """

    q: Tensor
    k: Tensor
    shift: Tensor | None = None
    flags: frozenset[str] = frozenset()
    order: tuple[int, ...] | None = None
    """Where the logits' dimensions (..., T, S) lie in the tensor, None: in that order."""


class LogitTrail:
    """Remembers which tensors are logits of which q and k; holds no logits alive."""

    def __init__(self) -> None:
        self._origins: dict[int, tuple[weakref.ref[Tensor], Origin]] = {}
        # Attention weights, once through their softmax: their product with the values makes no logits.
        self._weights: dict[int, weakref.ref[Tensor]] = {}

    def __bool__(self) -> bool:
        """Whether any tensor is being followed."""
        return bool(self._origins or self._weights)

    def clear(self) -> None:
        self._origins.clear()
        self._weights.clear()

    def saw(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: object
    ) -> None:
        """Takes every torch function in order: products begin a trail, others may carry one on."""
        if not isinstance(result, Tensor) or result.ndim <= _MATRIX:
            return
        if func in PRODUCTS:
            origin = _origin(func, args, kwargs)
            if origin is not None and not any(self._is_weights(tensor) for tensor in _tensors(args)):
                self._remember(result, origin)
            return
        if func in SOFTMAXES:
            if self.origin_of(args[0] if args else kwargs.get("input")) is not None:
                self._remember_weights(result)
            return
        for source in _tensors(args):
            if self._is_weights(source) and result.shape == source.shape:
                self._remember_weights(result)
                return
            origin = self.origin_of(source)
            if origin is not None and _still_logits(result, source):
                self._remember(result, self._carried(func, args, source, result, origin))
                return

    def origin_of(self, tensor: object) -> Origin | None:
        found = self._origins.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else None

    def call_of(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], heads: int | None, batch: int | None
    ) -> AttentionCall | None:
        """The attention call that a softmax is, None where its input is no product of two activations.

        Args:
            args: of the softmax.
            kwargs: of the softmax.
            heads: query heads, should the logits not show them.
            batch: sequences, should neither show them.
        """
        logits = args[0] if args else kwargs.get("input")
        origin = self.origin_of(logits)
        if origin is None or not isinstance(logits, Tensor):
            return None
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if dim not in (-1, logits.ndim - 1):
            raise UnsupportedCallError(
                f"the softmax runs over dimension {dim}, not over the keys in the last"
            )
        if origin.order is not None and logits.ndim == len(origin.order):
            logits = logits.permute(origin.order)
        if logits.ndim == 4:  # noqa: PLR2004 - (B, H, T, S)
            heads = logits.shape[1]
        elif not heads and batch and logits.shape[0] % batch == 0:
            heads = logits.shape[0] // batch
        true = logits.detach() if origin.shift is None else logits.detach() + origin.shift.detach()
        return AttentionCall(
            q_bhtk=_by_heads(origin.q, heads),
            k_bgsk=_by_heads(origin.k, heads),
            scale=None,
            logits_bhts=_by_heads(true, heads),
            flags=tuple(origin.flags),
        )

    def _remember(self, tensor: Tensor, origin: Origin) -> None:
        key = id(tensor)
        self._origins[key] = (weakref.ref(tensor, lambda _: self._origins.pop(key, None)), origin)

    def _remember_weights(self, tensor: Tensor) -> None:
        key = id(tensor)
        self._weights[key] = weakref.ref(tensor, lambda _: self._weights.pop(key, None))

    def _is_weights(self, tensor: Tensor) -> bool:
        found = self._weights.get(id(tensor))
        return found is not None and found() is tensor

    @staticmethod
    def _carried(
        func: Callable[..., Any], args: tuple[Any, ...], source: Tensor, result: Tensor, origin: Origin
    ) -> Origin:
        if result.shape[-1] > source.shape[-1]:
            return replace(origin, flags=origin.flags | {"sink"})
        if func in _TANHS:
            return replace(origin, flags=origin.flags | {"softcap"})
        other = next((arg for arg in args[:2] if isinstance(arg, Tensor) and arg is not source), None)
        if other is None:
            return origin
        if func in _SUBTRACTIONS and args[0] is source and other.shape[-1] == 1:
            shift = other if origin.shift is None else origin.shift + other
            return replace(origin, shift=shift.detach())
        if (
            func in _ADDITIONS
            and other.is_floating_point()
            and bool(((other > _HIDDEN) & (other != 0)).any())
        ):
            return replace(origin, flags=origin.flags | {"bias"})
        return origin


def _origin(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Origin | None:
    """Q and k of a product of two activations, (..., T, K) and (..., S, K)."""
    if func is torch.einsum:
        return _einsum_origin(args)
    flags: frozenset[str] = frozenset()
    if func in (torch.baddbmm, torch.Tensor.baddbmm):
        if kwargs.get("beta", 1) and _is_bias(args[0]):
            flags = frozenset({"bias"})
        args = args[1:]
    left = args[0] if args else kwargs.get("input", kwargs.get("batch1"))
    right = args[1] if len(args) > 1 else kwargs.get("other", kwargs.get("mat2", kwargs.get("batch2")))
    if not _are_activations(left, right):
        return None
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    return Origin(left, right.mT, flags=flags)


def _einsum_origin(args: tuple[Any, ...]) -> Origin | None:
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or not _are_activations(*operands):  # noqa: PLR2004 - q and k
        return None
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    if not arrow or "." in equation or len(output) <= _MATRIX:
        return None
    rows = [letter for letter in output if letter in left and letter not in right]
    contracted = [letter for letter in left if letter in right and letter not in output]
    key = output[-1]
    if len(rows) != 1 or len(contracted) != 1 or key not in right or key in left:
        return None
    lead = "".join(letter for letter in output if letter not in (rows[0], key))
    order = tuple(output.index(letter) for letter in lead + rows[0] + key)
    q, k = operands
    return Origin(
        _ordered(q, left, lead + rows[0] + contracted[0]),
        _ordered(k, right, lead + key + contracted[0]),
        order=None if order == tuple(range(len(order))) else order,
    )


def _is_bias(added: object) -> bool:
    """Whether something real is added to logits, rather than a mask or nothing; looks at values."""
    return (
        isinstance(added, Tensor)
        and added.is_floating_point()
        and bool(((added > _HIDDEN) & (added != 0)).any())
    )


def _ordered(tensor: Tensor, letters: str, wanted: str) -> Tensor:
    """The dimensions in the wanted order; one that is missing (a key shared by heads) gets size 1."""
    ordered = tensor.permute([letters.index(letter) for letter in wanted if letter in letters])
    for position, letter in enumerate(wanted):
        if letter not in letters:
            ordered = ordered.unsqueeze(position)
    return ordered


def _are_activations(*operands: object) -> bool:
    return all(
        isinstance(operand, Tensor) and not isinstance(operand, nn.Parameter) and operand.ndim > _MATRIX
        for operand in operands
    )


def _still_logits(result: Tensor, source: Tensor) -> bool:
    """Whether a result can be the same logits: as many rows and keys, or a few keys more (sinks)."""
    rows, keys = source.shape[-2:]
    extra = result.shape[-1] - keys
    return (
        result.shape[-2] == rows
        and 0 <= extra <= 1
        and result.numel() == source.numel() // keys * (keys + extra)
    )


def _tensors(args: tuple[Any, ...]) -> Iterator[Tensor]:
    for arg in args:
        if isinstance(arg, Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (each for each in arg if isinstance(each, Tensor))


def _by_heads(x: Tensor, heads: int | None) -> Tensor:
    """(B, H, rows, columns), from that, from (B, G, H/G, ...) or from (B H, ...)."""
    if x.ndim == 4:  # noqa: PLR2004 - (B, H, rows, columns)
        return x
    if x.ndim == 5:  # noqa: PLR2004 - (B, G, H / G, rows, columns)
        return x.flatten(1, 2)
    if x.ndim == 3 and heads and x.shape[0] % heads == 0:  # noqa: PLR2004 - (B H, rows, columns)
        return x.reshape(-1, heads, *x.shape[1:])
    raise UnsupportedCallError(
        f"the logits have shape {tuple(x.shape)}; heads cannot be told from sequences without a head count on the module"
    )
