"""What an attention call says: its arguments, brought into one form whichever function was called.

Shape suffixes: B sequences, H query heads, G key heads, T query rows, S keys, K head size, E model width.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from diagnostics.measure.attention import HIDDEN_BIAS

_MHA_SIGNATURE = inspect.signature(functional.multi_head_attention_forward)


class UnsupportedCallError(Exception):
    """An attention call whose quantities cannot be had exactly; the message says why."""


@dataclass(frozen=True)
class AttentionCall:
    """One softmax attention: logits are scale * q k^T + bias over the visible keys.

    Attributes:
        q_bhtk: queries, (B, H, T, K).
        k_bgsk: keys, (B, G, S, K); query head h uses key head h // (H / G).
        scale: factor on q.k, None where only the logits themselves are known.
        is_causal: whether row t sees keys 0..t only.
        mask: None, bool (True: visible) or float (added), broadcastable to (B, H, T, S).
        weights: the parameters holding Wq and Wk and the first row of each, where the call itself names them.
        cross: whether the call itself says that queries and keys come from different tensors.
        logits_bhts: the logits as the model computed them, mask and bias included; where given, they are what is
            measured, and `scale`, `is_causal` and `mask` say nothing.
        logits_of: gives the logits of some sequences and rows, (B, H, R, S), -inf where hidden; for calls whose
            logits are a function of the indices.
        flags: what was seen between q k^T and the softmax.
    """

    q_bhtk: Tensor
    k_bgsk: Tensor
    scale: float | None
    is_causal: bool = False
    mask: Tensor | None = None
    weights: tuple[tuple[Tensor, int], tuple[Tensor, int]] | None = None
    cross: bool = False
    logits_bhts: Tensor | None = None
    logits_of: Callable[[Tensor, Tensor], Tensor] | None = None
    flags: tuple[str, ...] = ()

    @property
    def has_bias(self) -> bool:
        """Whether something real is added to visible logits (ALiBi, relative positions); fetches from the device."""
        if self.mask is None or self.mask.dtype == torch.bool:
            return False
        visible = self.mask > HIDDEN_BIAS
        return bool((visible & (self.mask != 0)).any())


def scaled_dot_product_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,  # noqa: ARG001 - the signature of the observed function
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 - as above
    is_causal: bool = False,  # noqa: FBT001, FBT002 - as above
    scale: float | None = None,
    enable_gqa: bool = False,  # noqa: ARG001, FBT001, FBT002 - seen from the shapes
) -> AttentionCall:
    """From the arguments of torch.nn.functional.scaled_dot_product_attention; q and k keep their graph, for the probe."""
    if query.is_nested or key.is_nested:
        raise UnsupportedCallError("nested tensors are not supported yet")
    q_bhtk, k_bgsk = _four_dimensions(query), _four_dimensions(key)
    batch = max(q_bhtk.shape[0], k_bgsk.shape[0])
    mask = attn_mask
    if mask is not None and query.ndim == 3 and mask.ndim == 3:  # noqa: PLR2004 - (B, T, S): its B is no head
        mask = mask[:, None]
    return AttentionCall(
        q_bhtk.expand(batch, -1, -1, -1),
        k_bgsk.expand(batch, -1, -1, -1),
        scale if scale is not None else 1.0 / math.sqrt(query.shape[-1]),
        is_causal,
        mask,
    )


@torch.no_grad()
def multi_head_call(*args: Any, **kwargs: Any) -> AttentionCall:  # noqa: ANN401 - the observed function's own
    """From the arguments of torch.nn.functional.multi_head_attention_forward, which projects by itself."""
    bound = _MHA_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    a = bound.arguments
    if a["static_k"] is not None:
        raise UnsupportedCallError("static_k replaces the keys, so there is no Wk in this call")
    query_tbe, key_sbe = a["query"], a["key"]
    if query_tbe.ndim == 2:  # noqa: PLR2004 - (T, E) without a batch
        query_tbe, key_sbe = query_tbe[:, None], key_sbe[:, None]
    width, heads = a["embed_dim_to_check"], a["num_heads"]
    bias = a["in_proj_bias"]
    bias_q, bias_k = (None, None) if bias is None else (bias[:width], bias[width : 2 * width])
    if a["use_separate_proj_weight"]:
        weight_q, weight_k, key_row = a["q_proj_weight"], a["k_proj_weight"], 0
        q_tbe, k_sbe = (
            functional.linear(query_tbe, weight_q, bias_q),
            functional.linear(key_sbe, weight_k, bias_k),
        )
    else:
        weight_q = weight_k = a["in_proj_weight"]
        key_row = width
        q_tbe = functional.linear(query_tbe, weight_q[:width], bias_q)
        k_sbe = functional.linear(key_sbe, weight_k[width : 2 * width], bias_k)
    if a["bias_k"] is not None:
        k_sbe = torch.cat([k_sbe, a["bias_k"].expand(1, k_sbe.shape[1], -1)])
    if a["add_zero_attn"]:
        k_sbe = torch.cat([k_sbe, k_sbe.new_zeros(1, *k_sbe.shape[1:])])
    q_bhtk, k_bhsk = _split_heads(q_tbe, heads), _split_heads(k_sbe, heads)
    mask = _multi_head_mask(a["attn_mask"], a["key_padding_mask"], heads, keys=k_sbe.shape[0])
    return AttentionCall(
        q_bhtk, k_bhsk, 1.0 / math.sqrt(width // heads), is_causal=False, mask=mask,
        weights=((weight_q, 0), (weight_k, key_row)), cross=not _same(a["query"], a["key"]),
    )  # fmt: skip


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two arguments are one tensor, also where nn.MultiheadAttention has transposed each by itself."""
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride())


def _split_heads(x_tbe: Tensor, heads: int) -> Tensor:
    rows, batch, width = x_tbe.shape
    return x_tbe.reshape(rows, batch, heads, width // heads).permute(1, 2, 0, 3)


def _multi_head_mask(
    attn_mask: Tensor | None, padding_bs: Tensor | None, heads: int, keys: int
) -> Tensor | None:
    """Both masks of multi_head_attention_forward as one; there True means hidden, the opposite of here."""
    parts = []
    if attn_mask is not None:
        rows_keys = attn_mask.shape[-2:]
        parts.append(attn_mask if attn_mask.ndim == 2 else attn_mask.reshape(-1, heads, *rows_keys))  # noqa: PLR2004 - (T, S)
    if padding_bs is not None:
        parts.append(
            padding_bs[..., None, None, :] if padding_bs.ndim > 1 else padding_bs[None, None, None, :]
        )
    total: Tensor | None = None
    for part in parts:
        added = (
            torch.zeros(part.shape, device=part.device).masked_fill(part, -math.inf)
            if part.dtype == torch.bool
            else part
        )
        # bias_k and add_zero_attn append keys that every row sees.
        added = functional.pad(added.float(), (0, keys - added.shape[-1]))
        total = added if total is None else total + added
    return total


def _four_dimensions(x: Tensor) -> Tensor:
    if x.ndim == 4:  # noqa: PLR2004 - (B, H, T, K)
        return x
    if x.ndim == 3:  # noqa: PLR2004 - (B, T, K): one head
        return x[:, None]
    raise UnsupportedCallError(f"q or k has {x.ndim} dimensions, expected (batch, heads, rows, head size)")


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """A mask as (visible, bias): bool, and what is added to the visible logits (None for a bool mask)."""
    if mask.dtype == torch.bool:
        return mask, None
    visible = mask > HIDDEN_BIAS
    return visible, torch.where(visible, mask, torch.zeros((), dtype=mask.dtype, device=mask.device))
