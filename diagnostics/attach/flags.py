"""What a call shows of itself between q k^T and the softmax: biases, windows, caps, sinks, keys from elsewhere.

Shape suffixes: R observed rows, S keys.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from diagnostics.attach.calls import AttentionCall
from diagnostics.attach.products import Product
from diagnostics.attach.sampling import observed_rows
from diagnostics.attach.site import Site
from diagnostics.measure.attention import HIDDEN_LOGIT

OF_THE_PROJECTIONS = ("rope", "qk_norm")
"""Flags that the probe gives; all others are the call's own, and differ between sites of one class."""
_ROWS = 64
_SLIDES = 2


def call_flags(call: AttentionCall, site: Site, products: Iterable[Product]) -> tuple[str, ...]:
    """Flags of a call; looks at values, so it is asked at a site's first call only."""
    flags = list(call.flags)
    if call.has_bias:
        flags.append("bias")
    if _is_window(call):
        flags.append("window")
    if call.cross or _is_cross(call, site, products):
        flags.append("cross")
    return tuple(flags)


def _is_cross(call: AttentionCall, site: Site, products: Iterable[Product]) -> bool:
    """Whether queries and keys are projected from different tensors."""
    if site.query is None or site.key is None:
        return call.q_bhtk.shape[2] != call.k_bgsk.shape[2]
    sources = {product.parameter: product.source for product in products}
    # The innermost product is the one that the tensor itself goes through.
    query, key = [*site.query.each()][-1].parameter, [*site.key.each()][-1].parameter
    if query in sources and key in sources:
        return sources[query] != sources[key]
    return query != key and call.q_bhtk.shape[2] != call.k_bgsk.shape[2]


def _is_window(call: AttentionCall) -> bool:
    """Whether the first visible key moves on with the row, as in a sliding window; padding and packing do not."""
    if call.mask is None and call.logits_bhts is None and call.logits_of is None:
        return False
    length = call.q_bhtk.shape[2]
    rows_r = torch.arange(max(0, length - _ROWS), length)
    visible_rs = _visible(call, rows_r.to(call.q_bhtk.device))
    seen_r = visible_rs.any(-1)
    first_r = visible_rs.int().argmax(-1).cpu()
    slides = (first_r[1:] - first_r[:-1] == 1) & (first_r[1:] > 0) & seen_r[1:].cpu() & seen_r[:-1].cpu()
    moving = first_r[1:] != first_r[:-1]
    return bool(slides.sum() >= _SLIDES) and bool((slides | ~moving).all())


def _visible(call: AttentionCall, rows_r: Tensor) -> Tensor:
    """Which keys the last sequence's first head sees from these rows, (R, S)."""
    last = torch.tensor([call.q_bhtk.shape[0] - 1], device=call.q_bhtk.device)
    observed = observed_rows(call, sequences_b=last, rows_r=rows_r)
    if observed.logits_bhrs is not None:
        return observed.logits_bhrs[0, 0] > HIDDEN_LOGIT
    assert observed.visible is not None
    return observed.visible.expand(1, -1, -1, -1)[0, 0].expand(len(rows_r), call.k_bgsk.shape[2])
