"""Which features of a product each head's q or k depends on, by gradient; `.grad` and random state stay untouched.

Shape suffixes: H heads, T rows, K head size, F features of a product, N rows of a product's output.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.attach.graph import gradients
from diagnostics.attach.products import Product


@dataclass(frozen=True)
class Energies:
    """Squared gradient of each head with respect to a product's features, and the output's rows it was found in."""

    energy_hf: Tensor
    tokens_t: Tensor | None


def energies_of(x_bhtk: Tensor, products: Sequence[Product], start: int, stop: int) -> list[Energies | None]:
    """For each product what features `start` to `stop` of each head depend on; None where on nothing.

    All heads in one backward where tokens do not mix on the way: each head is asked for at tokens of its own.
    """
    coded = _energies_by_token(x_bhtk, products, start, stop)
    if coded is not None:
        wide = any(each is not None and _width(each) > stop - start for each in coded)
        # More features than a head has: a norm over all heads couples them, or tokens mix (a convolution after the
        # projection) and one head's tokens are not its own; then a head alone depends on its own features only.
        if not wide or x_bhtk.shape[1] == 1:
            return coded
        alone = _energies_by_head(x_bhtk, products, start, stop, heads=1)
        if any(each is not None and _width(each) > stop - start for each in alone):
            return coded
    return _energies_by_head(x_bhtk, products, start, stop, heads=x_bhtk.shape[1])


def _width(found: Energies) -> int:
    return int((found.energy_hf != 0).sum(-1).max())


def _energies_by_head(
    x_bhtk: Tensor, products: Sequence[Product], start: int, stop: int, *, heads: int
) -> list[Energies | None]:
    by_head: list[list[Tensor]] = [[] for _ in products]
    for head in range(heads):
        cotangent = torch.zeros_like(x_bhtk)
        cotangent[0, head, :, start:stop] = weighted(x_bhtk[0, head, :, start:stop])
        found = gradients(x_bhtk, cotangent, [product.output for product in products])
        for product, gradient, energies in zip(products, found, by_head, strict=True):
            width = product.by_feature(product.output.detach()).shape[-1]
            energies.append(
                torch.zeros(width, dtype=torch.float64, device=x_bhtk.device)
                if gradient is None
                else product.by_feature(gradient).double().square().sum(0)
            )
    stacked = [torch.stack(energies) for energies in by_head]
    return [Energies(energy_hf, None) if bool((energy_hf != 0).any()) else None for energy_hf in stacked]


def _energies_by_token(
    x_bhtk: Tensor, products: Sequence[Product], start: int, stop: int
) -> list[Energies | None] | None:
    _, heads, length, _ = x_bhtk.shape
    by_product: list[list[Tensor]] = [[] for _ in products]
    tokens: list[Tensor | None] = [None for _ in products]
    for first in range(0, heads, length):
        chunk = range(first, min(first + length, heads))
        cotangent = torch.zeros_like(x_bhtk)
        for index, head in enumerate(chunk):
            mine = x_bhtk[0, head, index :: len(chunk), start:stop]
            cotangent[0, head, index :: len(chunk), start:stop] = weighted(mine)
        found = gradients(x_bhtk, cotangent, [product.output for product in products])
        for at, (product, gradient) in enumerate(zip(products, found, strict=True)):
            if gradient is None:
                continue
            gradient_nf = product.by_feature(gradient)
            tokens_t = (gradient_nf != 0).any(-1).nonzero().flatten()
            if tokens_t.numel() == 0:
                continue
            if tokens_t.numel() != length:
                return None  # rows without any gradient, or tokens that mix: head by head instead
            tokens[at] = tokens_t
            seen_tf = gradient_nf[tokens_t].double().square()
            by_product[at] += [seen_tf[index :: len(chunk)].sum(0) for index in range(len(chunk))]
    if any(energies and len(energies) != heads for energies in by_product):
        return None  # some heads' share showed no gradient: head by head instead
    return [
        Energies(torch.stack(energies), tokens_t) if energies else None
        for energies, tokens_t in zip(by_product, tokens, strict=True)
    ]


def weighted(part: Tensor) -> Tensor:
    """A cotangent for `part`: weights of no common ratio, so that no two contributions cancel; a formula, not the random generator."""
    weights = torch.linspace(0.5, 1.5, part.numel(), device=part.device).view(part.shape)
    signs = torch.where(torch.arange(part.shape[-1], device=part.device) % 2 == 0, 1.0, -0.7)
    return (weights * signs).to(part.dtype)
