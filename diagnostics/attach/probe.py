"""Which output features of which projection each head's q and k are made of.

The projections just before an attention call are seen as torch functions (`Product`). The gradient of one
head's q with respect to a projection's output is non-zero on exactly the features that the head uses; with
them the layout is read off instead of assumed: fused or separate, interleaved or not, transposed or not,
either pairing of grouped queries, one product or several side by side. Nothing here touches `.grad`,
parameters or random state.

Shape suffixes: H heads, T rows, K head size, F features of a product, N rows of a product's output.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.attach.between import NOTHING, Between, Gained, between
from diagnostics.attach.graph import Upstream, gradients, upstream
from diagnostics.attach.head_gradients import Energies, energies_of, weighted
from diagnostics.attach.products import Product
from diagnostics.attach.site import Gain, Projection

DOMINANCE = 3.0
"""How many times the gradient of any other block a head's own must have, under a norm over all heads."""

Rows = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Unknown:
    """Why a layout is not known.

    Attributes:
        reason: in words.
        contradicts: whether the probe ran and showed that no rows of one parameter are it, so that name rules
            must not answer instead.
        flags: what was seen all the same.
    """

    reason: str
    contradicts: bool = True
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Features `start` to `stop` of every head, all from one product."""

    product: Product
    rows: Rows
    start: int
    stop: int
    dense: bool = False
    tokens_t: Tensor | None = None
    """Rows of the product's output that belong to the first sequence, in order; None where they could not be told."""
    inner: Projection | None = None
    root: int | None = None
    """Id of the tensor that the inner product multiplies."""

    @property
    def source(self) -> int:
        """Id of the tensor that all products of this part begin with."""
        return self.product.source if self.root is None else self.root


@dataclass(frozen=True)
class Support:
    """The features that the heads use, part by part, and what lies between them and attention."""

    parts: tuple[Part, ...]
    between: Between

    @property
    def product(self) -> Product:
        return self.parts[0].product

    @property
    def sources(self) -> set[int]:
        return {part.source for part in self.parts}

    @property
    def parameters(self) -> set[str]:
        return {part.product.parameter for part in self.parts}

    @property
    def flags(self) -> tuple[str, ...]:
        return self.between.flags

    @property
    def rows(self) -> Rows:
        """For each head, the features of the first product; those of further parts make heads distinct as well."""
        return self.parts[0].rows

    @property
    def identities(self) -> list[tuple[object, ...]]:
        """For each head, all its features: equal where a key was repeated for several query heads."""
        return [tuple(part.rows[head] for part in self.parts) for head in range(len(self.rows))]

    def projection(self, heads: Sequence[int]) -> Projection:
        """The rows of some heads as they lie in the parameters."""
        first, *more = (self._projection_of(part, heads) for part in self.parts)
        return replace(first, more=tuple(more))

    def _projection_of(self, part: Part, heads: Sequence[int]) -> Projection:
        found = part.product.projection(tuple(part.rows[head] for head in heads))
        gained = self.between.gain
        gain = None
        if gained is not None:
            at_hk = tuple(tuple(gained.at_hk[head][part.start : part.stop]) for head in heads)
            gain = Gain(gained.parameter, at_hk, gained.plus)
        return replace(found, gain=gain, inner=part.inner)


def supports_of(
    x_bhtk: Tensor, products: Sequence[Product], name_of: Callable[[Tensor], str | None]
) -> Support | Unknown:
    """The features behind every head of q or k, or why they cannot be told.

    Args:
        x_bhtk: q or k as it enters attention, (B, H, T, K), still attached to the autograd graph.
        products: candidates, the latest first.
        name_of: a parameter's name, None for other tensors.
    """
    if not x_bhtk.requires_grad:
        return Unknown(
            "q and k carry no gradient (frozen or checkpointed), so the layout could not be probed",
            contradicts=False,
        )
    above = upstream(x_bhtk, products)
    if above.hooked:
        return Unknown(
            "a backward hook of the model's own lies between the projections and attention, and a probe would run it",
            contradicts=False,
        )
    if not above.products:
        return Unknown(
            "a product with a weight that is no parameter of the model (parametrised, merged or converted) makes q or k"
            if above.unknown
            else "no matrix product with a parameter was seen on the way to q or k"
        )
    several = _several(x_bhtk, above, name_of)
    if several is not None:
        return several
    parts = _parts(x_bhtk, above)
    if isinstance(parts, Unknown):
        return parts
    return _with_between(x_bhtk, parts, above.leaves, name_of)


def aligned(support: Support, x_bhtk: Tensor, other: Support) -> Support | Unknown:
    """The support with its rows in the order of the other's parts, so that feature k of q meets feature k of k."""
    if len(support.parts) > 1 or len(other.parts) == 1:
        same = [(p.start, p.stop) for p in support.parts] == [(p.start, p.stop) for p in other.parts]
        return (
            support
            if same or len(other.parts) == 1
            else Unknown("q and k are made of parts of different sizes")
        )
    part = support.parts[0]
    blocks: list[Rows] = []
    for each in other.parts:
        found = energies_of(x_bhtk, [part.product], each.start, each.stop)[0]
        rows = None if found is None else _exact_rows(found.energy_hf, each.stop - each.start)
        if rows is None:
            return Unknown("the order of q's features could not be matched with the parts that k is made of")
        blocks.append(rows)
    ordered = tuple(tuple(row for block in blocks for row in block[head]) for head in range(len(part.rows)))
    if ordered == part.rows:
        return support
    if support.between.gain is not None:
        return Unknown("q's features are reordered and scaled on the way to k's parts")
    return replace(support, parts=(replace(part, rows=ordered),))


# --- parts --------------------------------------------------------------------------------------------------


def _parts(x_bhtk: Tensor, above: Upstream) -> list[Part] | Unknown:
    """Goes through the products from the latest on; each takes its features off one end of the heads."""
    head_dim = x_bhtk.shape[-1]
    start, stop = 0, head_dim
    parts: list[Part] = []
    for product in above.products:
        found = energies_of(x_bhtk, [product], start, stop)[0]
        if found is None:
            continue
        counts = {int((energy_f != 0).sum()) for energy_f in found.energy_hf}
        if max(counts) >= stop - start:
            part = _last_part(product, found, start, stop)
        else:
            part = _end_part(x_bhtk, product, found, counts, start, stop)
        if isinstance(part, Unknown):
            return part
        parts.append(part)
        start, stop = (part.stop, stop) if part.start == start else (start, part.start)
        if start == stop:
            break
    if start < stop or not parts:
        used = head_dim - (stop - start)
        return Unknown(f"a head of size {head_dim} depends on {used} features of known projections only")
    return sorted(parts, key=lambda part: part.start)


def _several(x_bhtk: Tensor, above: Upstream, name_of: Callable[[Tensor], str | None]) -> Unknown | None:
    """Whether whole heads come from each of several products: by tokens (joint attention) or as their sum."""
    if len(above.products) == 1:
        return None
    length, head_dim = x_bhtk.shape[2:]
    # Products side by side share a head's features between them; only what makes whole heads has its first and last.
    first = _output_tokens(x_bhtk, above.products, slice(0, 1))
    last = _output_tokens(x_bhtk, above.products, slice(head_dim - 1, head_dim))
    whole = [
        (product, max(at_first, at_last))
        for product, at_first, at_last in zip(above.products, first, last, strict=True)
        if at_first and at_last
    ]
    if len(whole) < 2:  # noqa: PLR2004 - several
        return None
    names = ", ".join(product.parameter for product, _ in whole)
    if sum(tokens for _, tokens in whole) > length:
        return Unknown(
            f"q or k of one head is the sum of several projections ({names}), so there is no one Wq and Wk"
        )
    flags: set[str] = set()
    for product, tokens in whole:
        for piece_bhtk in (x_bhtk[:, :, :tokens], x_bhtk[:, :, length - tokens :]):
            flags.update(_stream_flags(piece_bhtk, product, above.leaves, name_of))
    return Unknown(
        f"different tokens have projections of their own ({names}), so there is no one Wq and Wk",
        flags=tuple(sorted(flags)),
    )


def _output_tokens(x_bhtk: Tensor, products: Sequence[Product], features: slice) -> list[int]:
    """How many rows of each product's output some features of all heads of the first sequence depend on."""
    cotangent = torch.zeros_like(x_bhtk)
    cotangent[0, :, :, features] = weighted(x_bhtk[0, :, :, features])
    found = gradients(x_bhtk, cotangent, [product.output for product in products])
    return [
        0 if gradient is None else int((product.by_feature(gradient) != 0).any(-1).sum())
        for product, gradient in zip(products, found, strict=True)
    ]


def _stream_flags(
    x_bhtk: Tensor, product: Product, leaves: Sequence[Tensor], name_of: Callable[[Tensor], str | None]
) -> tuple[str, ...]:
    """What lies between one stream's product and attention."""
    found = energies_of(x_bhtk, [product], 0, x_bhtk.shape[-1])[0]
    part = None if found is None else _last_part(product, found, 0, x_bhtk.shape[-1])
    if not isinstance(part, Part):
        return ()
    cotangent = torch.zeros_like(x_bhtk)
    cotangent[0] = weighted(x_bhtk[0])
    true = gradients(x_bhtk, cotangent, leaves) if leaves else ()
    met = [
        leaf for leaf, each in zip(leaves, true, strict=True) if each is not None and bool((each != 0).any())
    ]
    support = _with_between(x_bhtk, [part], met, name_of)
    return () if isinstance(support, Unknown) else support.flags


def _last_part(product: Product, found: Energies, start: int, stop: int) -> Part | Unknown:
    size = stop - start
    rows: list[tuple[int, ...]] = []
    dense = False
    for energy_f in found.energy_hf:
        used = torch.nonzero(energy_f).flatten().tolist()
        if len(used) > size:
            used, dense = _dominant(energy_f, size), True
            if not used:
                count = int((energy_f != 0).sum())
                return Unknown(
                    f"a head depends on {count} of {energy_f.numel()} features, more than its size {size}"
                )
        if len(used) < size:
            return Unknown(f"a head of size {size} depends on {len(used)} features only")
        rows.append(tuple(used))
    return Part(product, tuple(rows), start, stop, dense, found.tokens_t)


def _end_part(
    x_bhtk: Tensor, product: Product, found: Energies, counts: set[int], start: int, stop: int
) -> Part | Unknown:
    """A product that gives a head fewer features than it has gives them at one end: which end is tried."""
    problem = Unknown(
        f"a head of size {stop - start} depends on {max(counts)} features of {product.parameter}, in no order that is known"
    )
    if len(counts) > 1:
        return problem
    size = counts.pop()
    for low, high in ((start, start + size), (stop - size, stop)):
        inside = energies_of(x_bhtk, [product], low, high)[0]
        outer = (high, stop) if low == start else (start, low)
        if inside is None or energies_of(x_bhtk, [product], *outer)[0] is not None:
            continue
        rows = _exact_rows(inside.energy_hf, size)
        if rows is not None:
            return Part(product, rows, low, high, tokens_t=found.tokens_t)
    return problem


def _exact_rows(energy_hf: Tensor, size: int) -> Rows | None:
    rows = [tuple(torch.nonzero(energy_f).flatten().tolist()) for energy_f in energy_hf]
    return tuple(rows) if all(len(row) == size for row in rows) else None


def _dominant(energy_f: Tensor, head_dim: int) -> list[int]:
    """The head's own block of features, where a norm over all heads makes every feature matter a little.

    Such a norm couples features with a weight of about one over their number; a head's own block of contiguous
    features carries several times the gradient of any other. Empty where none does.
    """
    if energy_f.numel() % head_dim:
        return []
    blocks = energy_f.view(-1, head_dim).sum(-1)
    first, second = torch.topk(blocks, 2).values.tolist()
    if first < DOMINANCE * second:
        return []
    start = int(blocks.argmax()) * head_dim
    return list(range(start, start + head_dim))


# --- what lies between --------------------------------------------------------------------------------------


def _with_between(
    x_bhtk: Tensor, parts: list[Part], leaves: Sequence[Tensor], name_of: Callable[[Tensor], str | None]
) -> Support | Unknown:
    dense = any(part.dense for part in parts)
    y_htk = _projected(parts)
    if y_htk is None:
        _, heads, _, head_dim = x_bhtk.shape
        sizes = {head_dim, heads * head_dim, len(set(parts[0].rows)) * head_dim}
        unseen = [name_of(leaf) or "a tensor" for leaf in leaves if leaf.numel() in sizes]
        if unseen:
            return Unknown(f"{', '.join(unseen)} could not be followed from the projection to attention")
        return Support(tuple(parts), replace(NOTHING, flags=("qk_norm",) if dense else ()))
    rows = parts[0].rows if len(parts) == 1 else None
    found = between(x_bhtk, y_htk, Gained.candidates(leaves, name_of, y_htk, rows, _features(parts)))
    if isinstance(found, str):
        return Unknown(found)
    if dense and "qk_norm" not in found.flags:
        found = replace(found, flags=("qk_norm", *found.flags))
    return Support(tuple(parts), found)


def _features(parts: Sequence[Part]) -> int:
    return int(parts[0].product.by_feature(parts[0].product.output.detach()).shape[-1])


def _projected(parts: Sequence[Part]) -> Tensor | None:
    """What was projected for the first sequence, (H, T, K), with the heads' own features in their order."""
    pieces = []
    for part in parts:
        if part.tokens_t is None:
            return None
        y_tf = part.product.by_feature(part.product.output.detach())[part.tokens_t]
        rows_hk = torch.tensor(part.rows, device=y_tf.device)
        pieces.append(y_tf[:, rows_hk].transpose(0, 1))
    return torch.cat(pieces, dim=-1)
