"""Which query rows of which sequences are observed; deterministic, so no random state is touched.

Shape suffixes: B observed sequences, H query heads, G key heads, R observed rows, S keys, K head size.
"""

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.attach.calls import AttentionCall, split_mask
from diagnostics.errors import DiagnosticsError
from diagnostics.measure.attention import RowStatistics, observe_logits, observe_rows

ROWS = 256
"""Rows observed per head: the mean entropy of 256 of 4096 rows is within 0.1 nats of that of all rows."""
ROWS_VARIABLE = "DIAGNOSTICS_ROWS"
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
    sinks: int = 0
    """Columns at the end of the logits that are no keys but take weight like one."""

    @property
    def device(self) -> torch.device:
        tensor = self.q_bhrk if self.logits_bhrs is None else self.logits_bhrs
        assert tensor is not None
        return tensor.device

    def statistics(self) -> RowStatistics:
        """The rows measured: entropy, its bound, largest logit, map rank."""
        if self.logits_bhrs is not None:
            return observe_logits(self.logits_bhrs, sinks=self.sinks)
        assert self.q_bhrk is not None
        assert self.k_bgsk is not None
        return observe_rows(self.q_bhrk, self.k_bgsk, scale=self.scale, visible=self.visible, bias=self.bias)


def rows_wanted() -> int | None:
    """Rows observed per head: `ROWS`, or what DIAGNOSTICS_ROWS in the environment asks for; None: all.

    Raises:
        DiagnosticsError: DIAGNOSTICS_ROWS is neither a whole number of at least 1 nor `all`.
    """
    text = os.environ.get(ROWS_VARIABLE, "")
    if not text:
        return ROWS
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise DiagnosticsError(
            f"{ROWS_VARIABLE} is {text!r}, it must be a whole number of at least 1, or all"
        )
    return int(text)


def observed_blocks(call: AttentionCall) -> list[ObservedRows]:
    """The rows of a call that are measured, in blocks whose logits take little memory."""
    rows = rows_wanted()
    if rows is not None and rows <= ROWS:
        return [observed_rows(call, rows=rows)]
    length, device = call.q_bhtk.shape[2], call.q_bhtk.device
    sequences_b = torch.tensor(spread(call.q_bhtk.shape[0], SEQUENCES), device=device)
    chosen_r = torch.tensor(
        spread(length, length if rows is None else rows // len(sequences_b)), device=device
    )
    return [observed_rows(call, sequences_b=sequences_b, rows_r=block_r) for block_r in chosen_r.split(ROWS)]


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indices out of `count`, evenly spread, the middle of each stratum."""
    wanted = min(count, wanted)
    return [((2 * index + 1) * count) // (2 * wanted) for index in range(wanted)]


def observed_rows(
    call: AttentionCall,
    *,
    rows: int = ROWS,
    sequences_b: Tensor | None = None,
    rows_r: Tensor | None = None,
) -> ObservedRows:
    """The rows of a call that are measured.

    Args:
        call: the attention call.
        rows: how many per head at most, stratified over the sequences.
        sequences_b: which sequences, None: a few of the batch.
        rows_r: which query rows, None: as many as `rows` allows.
    """
    keys = call.k_bgsk.shape[2]
    batch, _, length, _ = (call.q_bhtk if call.logits_bhts is None else call.logits_bhts).shape
    device = call.q_bhtk.device
    if sequences_b is None:
        sequence_count = min(batch, max(SEQUENCES, rows // max(1, length)))
        sequences_b = torch.tensor(spread(batch, sequence_count), device=device)
    if rows_r is None:
        rows_r = torch.tensor(spread(length, max(1, rows // len(sequences_b))), device=device)
    if call.logits_bhts is not None:
        logits_bhrs = call.logits_bhts.detach()[sequences_b][:, :, rows_r]
        return ObservedRows(logits_bhrs=logits_bhrs, sinks=logits_bhrs.shape[-1] - keys)
    if call.logits_of is not None:
        return ObservedRows(logits_bhrs=call.logits_of(sequences_b, rows_r))
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
