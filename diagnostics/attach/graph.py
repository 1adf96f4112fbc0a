"""Walking the autograd graph from q or k back to the nearest products with a parameter.

The walk computes nothing. It tells which products a tensor is made of directly, and which parameters meet it
on the way: the gains and biases of a norm between a projection and attention.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diagnostics.attach.products import Product

# Names of the nodes that multiply matrices, and how many of their last inputs are the factors.
_FACTORS = {
    "MmBackward0": 2,
    "AddmmBackward0": 2,
    "BmmBackward0": 2,
    "BaddbmmBackward0": 2,
    "LinearBackward0": 2,
}


@dataclass(frozen=True)
class Upstream:
    """What a tensor is made of.

    Attributes:
        products: the nearest products on each way up, the latest first.
        leaves: parameters met before them.
        unknown: whether a product of two learned things was met whose weight is no parameter itself.
        hooked: whether a backward hook of the model's own lies on the way; a probe would run it.
    """

    products: tuple[Product, ...]
    leaves: tuple[Tensor, ...]
    unknown: bool
    hooked: bool


def upstream(tensor: Tensor, products: Sequence[Product]) -> Upstream:
    """Walks from a tensor to the nearest products on every way.

    Args:
        tensor: attached to the autograd graph.
        products: those that are known, the latest first.
    """
    node_of = {product.output.grad_fn: product for product in reversed(products) if product.output.grad_fn}
    found: list[Product] = []
    leaves: list[Tensor] = []
    unknown = hooked = False
    seen: set[Any] = set()
    waiting: list[Any] = [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in node_of:
            found.append(node_of[node])
            continue
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor) and not node.next_functions:
            leaves.append(leaf)
            hooked = hooked or bool(leaf._backward_hooks)  # noqa: SLF001 - torch has no public name for it
            continue
        hooked = hooked or node.name() == "BackwardHookFunctionBackward"
        factors = [step for step, _ in node.next_functions][-_FACTORS.get(node.name(), 0) :]
        if node.name() in _FACTORS and all(factor is not None for factor in factors):
            unknown = True
            continue
        waiting += [step for step, _ in node.next_functions]
    order = {id(product): index for index, product in enumerate(products)}
    found.sort(key=lambda product: order[id(product)])
    return Upstream(tuple(found), tuple(leaves), unknown, hooked)


def gradients(tensor: Tensor, cotangent: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Vector-Jacobian products, detached; the graph stays, and no `.grad` is written."""
    found: tuple[Tensor | None, ...] = torch.autograd.grad(
        [tensor], list(inputs), grad_outputs=[cotangent], retain_graph=True, allow_unused=True
    )
    return tuple(None if gradient is None else gradient.detach() for gradient in found)
