"""Which query rows of which sequences are observed; deterministic, so no random state is touched.

Shape suffixes: B observed sequences, H query heads, G key heads, R observed rows, S keys, K head size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.attach.calls import AttentionCall, split_mask
from diagnostics.measure.attention import RowStatistics, observe_logits, observe_rows

ROWS = 256
"""Rows observed per head: the mean entropy of 256 of 4096 rows is within 0.1 nats of that of all rows."""
SEQUENCES = 4
"""Sequences observed where one alone would fill the rows: padding and content differ between sequences."""


@dataclass(frozen=True)
class ObservedRows:
    """The part of an attention call that is measured: q (B,H,R,K), k (B,G,S,K), masks broadcastable to (B,H,R,S).

    Where the model showed its logits (B,H,R,S), these alone are kept.
    """

    q_bhrk: Tensor | None = None
    k_bgsk: Tensor | None = None
    scale: float = 1.0
    visible: Tensor | None = None
    bias: Tensor | None = None
    logits_bhrs: Tensor | None = None

    @property
    def device(self) -> torch.device:
        tensor = self.q_bhrk if self.logits_bhrs is None else self.logits_bhrs
        assert tensor is not None
        return tensor.device

    def statistics(self) -> RowStatistics:
        """The rows measured: entropy, its bound, largest logit, map rank."""
        if self.logits_bhrs is not None:
            return observe_logits(self.logits_bhrs)
        assert self.q_bhrk is not None
        assert self.k_bgsk is not None
        return observe_rows(self.q_bhrk, self.k_bgsk, scale=self.scale, visible=self.visible, bias=self.bias)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices out of `count`, evenly spread, the middle of each stratum."""
    wanted = min(count, wanted)
    return [((2 * index + 1) * count) // (2 * wanted) for index in range(wanted)]


def observed_rows(call: AttentionCall, rows: int = ROWS) -> ObservedRows:
    """At most `rows` query rows per head, stratified over a few sequences of the batch."""
    if call.logits_bhts is not None:
        batch, _, length, keys = call.logits_bhts.shape
    else:
        batch, _, length, _ = call.q_bhtk.shape
        keys = call.k_bgsk.shape[2]
    sequence_count = min(batch, max(SEQUENCES, rows // max(1, length)))
    device = call.q_bhtk.device
    sequences_b = torch.tensor(spread(batch, sequence_count), device=device)
    rows_r = torch.tensor(spread(length, max(1, rows // sequence_count)), device=device)
    if call.logits_bhts is not None:
        return ObservedRows(logits_bhrs=call.logits_bhts.detach()[sequences_b][:, :, rows_r])
    assert call.scale is not None, "a call that shows no logits gives their scale"
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
