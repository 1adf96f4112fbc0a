"""Which query rows of which sequences are observed; deterministic, so no random state is touched.

Shape suffixes: B observed sequences, H query heads, G key heads, R observed rows, S keys, K head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.attach.calls import AttentionCall, split_mask

ROWS = 256
"""Rows observed per head: the mean entropy of 256 of 4096 rows is within 0.1 nats of that of all rows."""
SEQUENCES = 4
"""Sequences observed where one alone would fill the rows: padding and content differ between sequences."""


@dataclass(frozen=True)
class ObservedRows:
    """The part of an attention call that is measured: q (B,H,R,K), k (B,G,S,K), masks broadcastable to (B,H,R,S)."""

    q_bhrk: Tensor
    k_bgsk: Tensor
    scale: float
    visible: Tensor | None
    bias: Tensor | None


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices out of `count`, evenly spread, the middle of each stratum."""
    wanted = min(count, wanted)
    return [((2 * index + 1) * count) // (2 * wanted) for index in range(wanted)]


def observed_rows(call: AttentionCall, rows: int = ROWS) -> ObservedRows:
    """At most `rows` query rows per head, stratified over a few sequences of the batch."""
    batch, _heads, length, _ = call.q_bhtk.shape
    keys = call.k_bgsk.shape[2]
    sequence_count = min(batch, max(SEQUENCES, rows // max(1, length)))
    device = call.q_bhtk.device
    sequences_b = torch.tensor(spread(batch, sequence_count), device=device)
    rows_r = torch.tensor(spread(length, max(1, rows // sequence_count)), device=device)
    q_bhrk = call.q_bhtk.detach()[sequences_b][:, :, rows_r]
    k_bgsk = call.k_bgsk.detach().expand(batch, -1, -1, -1)[sequences_b]
    visible: Tensor | None = None
    bias: Tensor | None = None
    if call.mask is not None:
        mask = call.mask.detach()
        mask = mask[(None,) * (4 - mask.ndim)]
        mask = mask.expand(batch, mask.shape[1], length, keys)[sequences_b][:, :, rows_r]
        visible, bias = split_mask(mask)
    if call.is_causal:
        causal_rs = torch.arange(keys, device=device) <= rows_r[:, None]
        visible = causal_rs if visible is None else visible & causal_rs
    return ObservedRows(q_bhrk, k_bgsk, call.scale, visible, bias)
