"""Matrix products with a parameter, however a model writes them: which parameter, and which axes are features.

A weight is taken as a strided view of its parameter, so that transposes, slices, parameters of three
dimensions and convolutions of size one are all the same: offsets into the parameter's own elements.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diagnostics.attach.site import Projection, View

_MATRIX = 2
# Position of the input and of the weight among the arguments, and whether the weight is (in, out).
_PLAIN: Mapping[Callable[..., Any], tuple[int, int, bool]] = {
    functional.linear: (0, 1, False),
    torch.addmm: (1, 2, True),
    torch.matmul: (0, 1, True),
    torch.Tensor.matmul: (0, 1, True),
    torch.Tensor.__matmul__: (0, 1, True),
    torch.mm: (0, 1, True),
}
_CONVOLUTIONS: frozenset[Callable[..., Any]] = frozenset(
    {torch.conv1d, torch.conv2d, torch.conv3d, functional.conv1d, functional.conv2d, functional.conv3d}
)
WATCHED: frozenset[Callable[..., Any]] = frozenset({*_PLAIN, *_CONVOLUTIONS, torch.einsum})
"""The torch functions that may be a product with a parameter."""


@dataclass(frozen=True)
class Product:
    """One product with a parameter seen in a forward.

    Attributes:
        output: still attached to the autograd graph.
        input: what was multiplied; the inner product of two that follow each other is found through it.
        parameter: name as named_parameters() gives it.
        view: the parameter as (features, in).
        feature_dims: dimensions of `output` that are features, in the order of the view's rows.
        module: path of the module that was running.
    """

    output: Tensor
    input: Tensor
    parameter: str
    shape: tuple[int, ...]
    view: View
    feature_dims: tuple[int, ...]
    module: str

    @property
    def source(self) -> int:
        """Id of the input: two products of one tensor are self attention, of two tensors cross attention."""
        return id(self.input)

    @property
    def width(self) -> int:
        """Size of the input."""
        return math.prod(self.view.size[self.view.features :])

    def by_feature(self, tensor: Tensor) -> Tensor:
        """A tensor of the output's shape as (everything else, features)."""
        last = range(-len(self.feature_dims), 0)
        moved = tensor.movedim(self.feature_dims, tuple(last))
        return moved.flatten(-len(self.feature_dims)).flatten(0, -2)

    def projection(self, rows: tuple[tuple[int, ...], ...]) -> Projection:
        """Where features lie in the parameter: its rows or columns where it is a matrix, else elements of the view."""
        starts = self.view.starts()
        if len(self.shape) == _MATRIX and len(self.view.size) == self.view.features + 1:
            height, width = self.shape
            size, stride = self.view.size[-1], self.view.stride[-1]
            if (size, stride) == (width, 1) and all(start % width == 0 for start in starts):
                return Projection(
                    self.parameter, tuple(tuple(starts[row] // width for row in head) for head in rows)
                )
            if (size, stride) == (height, width) and all(start < width for start in starts):
                return Projection(
                    self.parameter,
                    tuple(tuple(starts[row] for row in head) for head in rows),
                    transposed=True,
                )
        return Projection(self.parameter, rows, view=self.view)


def product_of(
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    output: Tensor,
    name_of: Callable[[Tensor], str | None],
    module: str,
) -> Product | None:
    """What a call of a watched function projects, or None where neither operand is a parameter or a view of one."""
    if func is torch.einsum:
        return _einsum(args, output, name_of, module)
    if func in _CONVOLUTIONS:
        source, weight = _argument(args, kwargs, 0, "input"), _argument(args, kwargs, 1, "weight")
        if not isinstance(weight, Tensor) or weight.ndim <= _MATRIX or set(weight.shape[2:]) != {1}:
            return None
        if (
            not isinstance(source, Tensor)
            or source.ndim < 1
            or source.shape[-weight.ndim + 1] != weight.shape[1]
        ):
            return None
        dims = (output.ndim - weight.ndim + 1,)
        return _product(source, weight, output, name_of, module, axes=((0,), (1,)), dims=dims)
    source_at, weight_at, transposed = _PLAIN[func]
    source = _argument(args, kwargs, source_at, "input")
    weight = _argument(args, kwargs, weight_at, "mat2" if transposed else "weight")
    if not isinstance(source, Tensor) or not isinstance(weight, Tensor) or weight.ndim != _MATRIX:
        return None
    axes = ((1,), (0,)) if transposed else ((0,), (1,))
    return _product(source, weight, output, name_of, module, axes=axes, dims=(output.ndim - 1,))


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], at: int, name: str) -> Any:  # noqa: ANN401 - as called
    return args[at] if len(args) > at else kwargs.get(name, kwargs.get("other"))


def _einsum(
    args: tuple[Any, ...], output: Tensor, name_of: Callable[[Tensor], str | None], module: str
) -> Product | None:
    """Two operands, one of them a parameter whose every axis is either contracted or a feature."""
    equation, *operands = args
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if (
        not isinstance(equation, str)
        or len(operands) != 2  # noqa: PLR2004 - input and weight
        or not all(isinstance(operand, Tensor) for operand in operands)
    ):
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    letters = inputs.replace("...", "").split(",")
    if not arrow or "." in letters[0] + letters[1]:
        return None
    result_letters = result.replace("...", "")
    ellipsis = output.ndim - len(result_letters)
    at = result.find("...")
    for weight_at in (1, 0):
        weight, source = operands[weight_at], operands[1 - weight_at]
        own, other = letters[weight_at], letters[1 - weight_at]
        contracted = tuple(
            i for i, letter in enumerate(own) if letter in other and letter not in result_letters
        )
        kept = tuple(i for i, letter in enumerate(own) if letter in result_letters and letter not in other)
        if not contracted or not kept or len(contracted) + len(kept) != len(own) or weight.ndim != len(own):
            continue
        places = [result_letters.index(own[i]) for i in kept]
        dims = tuple(place + (ellipsis if 0 <= at <= place else 0) for place in places)
        found = _product(source, weight, output, name_of, module, axes=(kept, contracted), dims=dims)
        if found is not None:
            return found
    return None


def _product(
    source: Tensor,
    weight: Tensor,
    output: Tensor,
    name_of: Callable[[Tensor], str | None],
    module: str,
    *,
    axes: tuple[tuple[int, ...], tuple[int, ...]],
    dims: tuple[int, ...],
) -> Product | None:
    name, parameter, stride, offset = name_of(weight), weight, _contiguous_stride(weight.shape), 0
    if name is None:
        base = weight._base  # noqa: SLF001 - torch has no public name for what a view is of
        if base is None or not base.is_contiguous():
            return None
        name, parameter = name_of(base), base
        stride, offset = weight.stride(), int(weight.storage_offset()) - int(base.storage_offset())
    if name is None:
        return None
    order = (*axes[0], *axes[1])
    view = View(
        tuple(weight.shape[axis] for axis in order),
        tuple(stride[axis] for axis in order),
        offset,
        len(axes[0]),
    )
    return Product(output, source, name, tuple(parameter.shape), view, dims, module)


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(itertools.accumulate((*shape[:0:-1],), lambda a, b: a * b, initial=1))[::-1]
