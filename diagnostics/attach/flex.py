"""FlexAttention: its score and mask functions evaluated on the observed rows alone.

Shape suffixes: B sequences, H query heads, G key heads, R observed rows, T query rows, S keys, K head size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention as flex_attention_operator

from diagnostics.attach.calls import AttentionCall

OPERATOR = flex_attention_operator
"""What torch.nn.attention.flex_attention.flex_attention calls in the end, compiled around it or not."""

Indexed = Callable[..., Tensor]


def flex_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,  # noqa: ARG001 - the signature of the observed operator
    score_mod: Indexed | None,
    block_mask: tuple[Any, ...],
    scale: float | None,
    kernel_options: object = None,  # noqa: ARG001 - as above
    score_buffers: tuple[Any, ...] = (),
    mask_buffers: tuple[Any, ...] = (),
) -> AttentionCall:
    """From the arguments of the FlexAttention operator; q and k keep their graph, for the probe."""
    mask_mod: Indexed = block_mask[-1]
    factor = scale if scale is not None else 1.0 / math.sqrt(query.shape[-1])

    def score(*indexed: Tensor) -> Tensor:
        return indexed[0] if score_mod is None else score_mod(*indexed, *score_buffers)

    def mask(*indices: Tensor) -> Tensor:
        return mask_mod(*indices, *mask_buffers)

    def logits_of(sequences_b: Tensor, rows_r: Tensor) -> Tensor:
        return _logits(query.detach(), key.detach(), factor, score, mask, sequences_b, rows_r)

    first, last = (torch.tensor([at], device=query.device) for at in (0, query.shape[2] - 1))
    scored = logits_of(first, last)
    plain = _logits(query.detach(), key.detach(), factor, lambda s, *_: s, mask, first, last)
    flags = () if torch.equal(scored, plain) else ("bias",)
    return AttentionCall(query, key, factor, logits_of=logits_of, flags=flags)


def _logits(
    q_bhtk: Tensor,
    k_bgsk: Tensor,
    scale: float,
    score: Indexed,
    mask: Indexed,
    sequences_b: Tensor,
    rows_r: Tensor,
) -> Tensor:
    """(B, H, R, S) logits after the score function, -inf where the mask function hides."""
    heads, groups, keys = q_bhtk.shape[1], k_bgsk.shape[1], k_bgsk.shape[2]
    q_bhrk = q_bhtk[sequences_b][:, :, rows_r].float()
    k_bhsk = (
        k_bgsk.expand(q_bhtk.shape[0], -1, -1, -1)[sequences_b].float().repeat_interleave(heads // groups, 1)
    )
    logits_bhrs = q_bhrk @ k_bhsk.mT * scale
    indices = (
        sequences_b,
        torch.arange(heads, device=q_bhtk.device),
        rows_r,
        torch.arange(keys, device=q_bhtk.device),
    )
    logits_bhrs = _over_all(score, scored=True)(logits_bhrs, *indices)
    return logits_bhrs.masked_fill(~_over_all(mask, scored=False)(*indices), -torch.inf)


def _over_all(function: Indexed, *, scored: bool) -> Indexed:
    """The function of scalar indices (b, h, q, k), mapped over all of them, outermost first."""
    mapped = function
    for position in (3, 2, 1, 0):
        indices = tuple(0 if index == position else None for index in range(4))
        mapped = torch.vmap(mapped, in_dims=(0, *indices) if scored else indices)
    return mapped
