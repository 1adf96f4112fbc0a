"""Which output features of which projection each head's q and k are made of.

The projections just before an attention call are seen as torch functions (`Product`). The gradient of one
head's q with respect to a projection's output is non-zero on exactly the features that the head uses; with
them the layout is read off instead of assumed: fused or separate, interleaved or not, transposed or not,
either pairing of grouped queries. Nothing here touches `.grad`, parameters or random state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.attach.site import Projection

DOMINANCE = 3.0
"""How many times the gradient of any other block a head's own must have, under a norm over all heads."""


@dataclass(frozen=True)
class Product:
    """One `x @ W` seen in a forward, and the path of the module that was running."""

    output: Tensor
    """(..., features), still attached to the autograd graph."""
    parameter: str
    transposed: bool
    """Whether the parameter is (in, out), so that features are its columns."""
    module: str
    source: int
    """id of the input tensor: two products of one tensor are self attention, of two tensors cross attention."""


@dataclass(frozen=True)
class Support:
    """The features of one product that the heads use, (heads) tuples, and the kind of map between."""

    product: Product
    rows: tuple[tuple[int, ...], ...]
    flags: tuple[str, ...]

    def projection(self) -> Projection:
        return Projection(self.product.parameter, self.rows, self.product.transposed)


def supports_of(x_bhtk: Tensor, products: Sequence[Product]) -> Support | str:
    """The features behind every head of q or k, or a sentence why they cannot be told.

    Args:
        x_bhtk: q or k as it enters attention, (B, H, T, K), still attached to the autograd graph.
        products: candidates, the latest first.
    """
    if not x_bhtk.requires_grad:
        return "q and k carry no gradient (frozen or checkpointed), so the layout could not be probed"
    for product in products:
        if not product.output.requires_grad:
            continue
        features = product.output.shape[-1]
        per_head = [_features_used(x_bhtk, head, product.output) for head in range(x_bhtk.shape[1])]
        if any(found is None for found in per_head):
            continue
        head_dim = x_bhtk.shape[-1]
        rows: list[tuple[int, ...]] = []
        dense = False
        for energy_f in per_head:
            assert energy_f is not None
            used = torch.nonzero(energy_f).flatten().tolist()
            if len(used) > head_dim:
                dominant = _dominant(energy_f, head_dim)
                if dominant is None:
                    return (
                        f"a head depends on {len(used)} of {features} features, more than its size {head_dim}"
                    )
                used, dense = dominant, True
            if len(used) < head_dim:
                return f"a head of size {head_dim} depends on {len(used)} features only"
            rows.append(tuple(used))
        flags = ("qk_norm",) if dense else _flags(x_bhtk, product.output, rows)
        return Support(product, tuple(rows), flags)
    return "no matrix product with a parameter was seen on the way to q or k"


def agrees(x_bhtk: Tensor, product: Product, rows: Sequence[Sequence[int]]) -> bool:
    """Whether the heads with odd index use exactly their expected features: one backward, for twins of a probed site."""
    if not (x_bhtk.requires_grad and product.output.requires_grad):
        return False
    heads = [head for head in range(x_bhtk.shape[1]) if head % 2] or [0]
    energy_f = _energy(x_bhtk[0, heads], product.output)
    if energy_f is None:
        return False
    expected = {row for head in heads for row in rows[head]}
    return set(torch.nonzero(energy_f).flatten().tolist()) == expected


def _features_used(x_bhtk: Tensor, head: int, output: Tensor) -> Tensor | None:
    return _energy(x_bhtk[0, head], output)


def _energy(part: Tensor, output: Tensor) -> Tensor | None:
    """Squared gradient per feature of a weighted sum of `part`, or None where it does not depend on `output`."""
    # Weights of no common ratio, so that no two contributions cancel; a formula, not the random generator.
    weights = torch.linspace(0.5, 1.5, part.numel(), device=part.device).view(part.shape).to(part.dtype)
    weights = weights * torch.where(torch.arange(part.shape[-1], device=part.device) % 2 == 0, 1.0, -0.7).to(
        part.dtype
    )
    gradient: Tensor | None = torch.autograd.grad(
        (part * weights).sum(), [output], retain_graph=True, allow_unused=True
    )[0]
    if gradient is None:
        return None
    energy_f = gradient.detach().double().square().flatten(0, -2).sum(0)
    return energy_f if bool((energy_f > 0).any()) else None


def _dominant(energy_f: Tensor, head_dim: int) -> list[int] | None:
    """The head's own block of features, where a norm over all heads makes every feature matter a little.

    Such a norm couples features with a weight of about one over their number; a head's own block of contiguous
    features carries several times the gradient of any other.
    """
    if energy_f.numel() % head_dim:
        return None
    blocks = energy_f.view(-1, head_dim).sum(-1)
    first, second = torch.topk(blocks, 2).values.tolist()
    if first < DOMINANCE * second:
        return None
    start = int(blocks.argmax()) * head_dim
    return list(range(start, start + head_dim))


def _flags(x_bhtk: Tensor, output: Tensor, rows: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """What lies between the projection and attention: nothing, a rotation (rope) or a normalisation (qk_norm)."""
    length = x_bhtk.shape[2]
    if output.ndim != 3 or output.shape[1] != length:  # noqa: PLR2004 - (B, T, features)
        return ()
    rows_hk = torch.tensor([list(row) for row in rows], device=output.device)
    y_htk = output.detach()[0][:, rows_hk].transpose(0, 1).double()
    x_htk = x_bhtk.detach()[0].double()
    if torch.allclose(y_htk.sort(-1).values, x_htk.sort(-1).values, rtol=1e-3, atol=1e-6):
        return ()
    norm_ht = y_htk.norm(dim=-1)
    # The embedding of a padding token is zero, and so is what is projected from it: it shows nothing.
    shown_t = (norm_ht > 1e-6 * norm_ht.amax()).all(0)
    if not bool(shown_t.any()):
        return ()
    y_htk, x_htk = y_htk[:, shown_t], x_htk[:, shown_t]
    ratio_ht = x_htk.norm(dim=-1) / y_htk.norm(dim=-1)
    spread_h = ratio_ht.amax(-1) / ratio_ht.amin(-1).clamp_min(1e-30)
    # A rotation keeps every token's norm, a fixed factor on q keeps their ratios, a norm layer keeps neither.
    if bool((spread_h > 1.02).any()):  # noqa: PLR2004 - half-precision rounding stays below 1 %
        return ("qk_norm",)
    scaled = y_htk * ratio_ht.mean(-1)[:, None, None]
    same = torch.allclose(scaled.sort(-1).values, x_htk.sort(-1).values, rtol=2e-2, atol=1e-6)
    return () if same else ("rope",)
