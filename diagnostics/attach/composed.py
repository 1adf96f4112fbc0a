"""Projections of projections: a product whose input is the (normed) output of an earlier product.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) makes q and k from latents: Wq_h = Wqb_h diag(g) Wqa,
and k of a part that is and a part that is not. Whether an inner product belongs to Wq or Wk is not told by its
name: it does where that brings q and k back to one and the same tensor.

Shape suffixes: N tokens, R size of the latent.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor, nn

from diagnostics.attach.graph import upstream
from diagnostics.attach.probe import Part, Support, Unknown, supports_of
from diagnostics.attach.products import Product

_TOKENS = 64
_NAMED_GAIN = re.compile(
    r"(^|[._])(q|k|qk|query|key)_?(ln|layer_?norm|norm|norm_[qk]_scale)([._]|$)|(^|[._])norm_?(q|k|query|key)([._]|$)"
)
_GAIN = re.compile(r"norm|scale|gain|gamma", re.IGNORECASE)


def compose(
    query: Support, key: Support, products: Sequence[Product], name_of: Callable[[Tensor], str | None]
) -> tuple[Support, Support] | Unknown:
    """Both with their inner products, where q and k come from one tensor only through them.

    Args:
        query: what q is made of.
        key: what k is made of.
        products: all that are known, the latest first.
        name_of: a parameter's name, None for other tensors.
    """
    parts = (*query.parts, *key.parts)
    shared = set.intersection(*({part.product.source} for part in parts))
    if not shared:
        inner = {id(part): _inner_product(part, products) for part in parts}
        reached = [_sources(part.product, inner[id(part)]) for part in parts]
        shared = set.intersection(*reached)
        if shared:
            root = shared.pop()
            sides = [_resolved(side, root, inner, products, name_of) for side in (query, key)]
            query_or, key_or = sides
            if isinstance(query_or, Unknown):
                return query_or
            return key_or if isinstance(key_or, Unknown) else (query_or, key_or)
    for side in (query, key):
        if len({part.product.width for part in side.parts}) > 1:
            return Unknown("parts of q or k come from different tensors, so there is no one Wq and Wk")
    return query, key


def says(query: Support, key: Support) -> str:
    """In words to add to a layout, what is multiplied with what; empty where rows of one parameter each are all."""
    told = []
    for letter, side in (("q", query), ("k", key)):
        if len(side.parts) > 1 or any(part.inner is not None for part in side.parts):
            names = [_name(part) for part in side.parts]
            told.append(f"{letter} = {names[0] if len(names) == 1 else '[' + '; '.join(names) + ']'}")
        if side.between.gain is not None:
            told.append(f"gain {_last(side.between.gain.parameter)} folded into {letter}")
    return "".join(f", {each}" for each in told)


def frozen_gain(module: nn.Module, sides: Sequence[Support], head_dim: int) -> str:
    """Name of a frozen parameter that may be the gain of a norm over q or k: the graph does not show it; else empty."""
    for side in sides:
        if "qk_norm" not in side.flags or side.between.gain is not None:
            continue
        sizes = {head_dim, head_dim * len(side.rows), head_dim * len(set(side.identities))}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad and parameter.numel() in sizes and _GAIN.search(name):
                return name
    return ""


def named_gain(module: nn.Module) -> str:
    """Name of a parameter that its name makes a norm's gain over q or k, for where no probe can tell; else empty."""
    return next((name for name, _ in module.named_parameters() if _NAMED_GAIN.search(name)), "")


def _last(parameter: str) -> str:
    return parameter.removesuffix(".weight").rpartition(".")[2]


def _name(part: Part) -> str:
    own = _last(part.product.parameter)
    if part.inner is None:
        return own
    gain = "" if part.inner.gain is None else " diag(gain)"
    return f"{own}{gain} {_last(part.inner.parameter)}"


def _inner_product(part: Part, products: Sequence[Product]) -> Product | None:
    source = part.product.input
    if not source.requires_grad or source.ndim < 2 or source.shape[-1] != part.product.width:  # noqa: PLR2004 - tokens, features
        return None
    above = upstream(source, products)
    return above.products[0] if len(above.products) == 1 and not above.unknown else None


def _sources(product: Product, inner: Product | None) -> set[int]:
    return {product.source} if inner is None else {product.source, inner.source}


def _resolved(
    side: Support,
    root: int,
    inner: dict[int, Product | None],
    products: Sequence[Product],
    name_of: Callable[[Tensor], str | None],
) -> Support | Unknown:
    parts = []
    for part in side.parts:
        if part.product.source == root:
            parts.append(part)
            continue
        latent_nr = part.product.input.flatten(0, -2)[:_TOKENS]
        found = supports_of(latent_nr[None, None], products, name_of)
        if isinstance(found, Unknown):
            return found
        if not found.between.elementwise or len(found.parts) > 1 or found.product is not inner[id(part)]:
            return Unknown(
                f"what {part.product.parameter} multiplies is made of {found.product.parameter} in a way that is no norm"
            )
        parts.append(replace(part, inner=found.projection([0]), root=root))
    return replace(side, parts=tuple(parts))
