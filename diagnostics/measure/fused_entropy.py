"""Exact attention entropy of every query row at the price of one fused attention call.

Attention with V := K returns sum_j p_j k_j, so q times it is the expected logit E[s]; with the kernel's own
log-sum-exp, H = lse - E[s]. No T x T matrix is formed unless the mask itself is one.

Shape suffixes: b sequence, h query head, g key head, t query, s key, k head channel.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own abbreviation

from diagnostics.errors import DiagnosticsError
from diagnostics.measure.attention import HIDDEN_BIAS
from diagnostics.measure.precision import full_precision
from diagnostics.measure.shapes import check_query_key_shapes

# Logits held at once where no fused kernel is at hand: 16 MiB of float32.
BLOCK_LOGITS = 2**22


@dataclass(frozen=True)
class FusedEntropy:
    """Per query row, float32: entropy (nats) and log-sum-exp of the scaled logits; NaN where no key is visible."""

    entropy_bht: Tensor
    lse_bht: Tensor


def attention_entropy(
    q_bhtk: Tensor,
    k_bgsk: Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    attn_mask: Tensor | None = None,
) -> FusedEntropy:
    """Entropy of each row of softmax(scale * q k^T + mask), by the fused kernel with V := K.

    Inputs are raised to float32 whatever their dtype: the bfloat16 kernel is off by tenths of a nat where logits
    are large. The float32 error is about 3e-7 times the largest logit after each head's keys have been centred
    (which leaves the entropy as it is). Query head h is paired with key head h // (H / G).
    On CUDA a float mask is checked, which synchronises; a bool mask is not.

    Args:
        q_bhtk: queries as they enter attention.
        k_bgsk: keys, G dividing H. A non-finite key makes all rows of its head NaN.
        scale: what q.k is multiplied by; None: d_head^-0.5.
        is_causal: row i sees the keys 0 to i, as in `scaled_dot_product_attention`; excludes `attn_mask`.
        attn_mask: broadcastable to (B, H, T, S); bool, True where a key is visible, or float with 0 where visible
            and -1e4 or less (-inf, finfo.min) where hidden.

    Raises:
        DiagnosticsError: shapes that do not fit, both masks at once, or a mask that is a real-valued bias.
    """
    check_query_key_shapes(q_bhtk, k_bgsk)
    if is_causal and attn_mask is not None:
        raise DiagnosticsError(
            "is_causal=True and an attn_mask were both given: fold the causal part into the mask"
        )
    scale = q_bhtk.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q_bhtk.device):
        hidden = None if attn_mask is None else _hidden(attn_mask)
        if 0 in q_bhtk.shape[:3] or k_bgsk.shape[2] == 0:
            nothing_bht = q_bhtk.new_full(q_bhtk.shape[:3], torch.nan, dtype=torch.float32)
            return FusedEntropy(nothing_bht, nothing_bht)
        q_bhtk = q_bhtk.float()
        k_bgsk = k_bgsk.float()
        offset_bg1k = k_bgsk.mean(2, keepdim=True)
        k_bhsk = _by_query_head(k_bgsk - offset_bg1k, q_bhtk.shape[1])
        expected_bhtk, lse_bht = _attend(q_bhtk, k_bhsk, scale, hidden, is_causal=is_causal)
        entropy_bht = (lse_bht - scale * expected_bhtk.mul_(q_bhtk).sum(-1)).clamp(min=0.0)
        lse_bht = lse_bht + scale * (q_bhtk @ _by_query_head(offset_bg1k, q_bhtk.shape[1]).mT)[..., 0]
        if hidden is not None:
            dead_bht = hidden.all(-1)
            entropy_bht = entropy_bht.masked_fill(dead_bht, torch.nan)
            lse_bht = lse_bht.masked_fill(dead_bht, torch.nan)
        return FusedEntropy(entropy_bht, lse_bht)


def _by_query_head(k_bgsk: Tensor, heads: int) -> Tensor:
    return k_bgsk if k_bgsk.shape[1] == heads else k_bgsk.repeat_interleave(heads // k_bgsk.shape[1], dim=1)


def _hidden(attn_mask: Tensor) -> Tensor:
    if attn_mask.dtype == torch.bool:
        hidden = ~attn_mask
    else:
        hidden = attn_mask <= HIDDEN_BIAS
        if not bool((hidden | (attn_mask == 0)).all()):
            raise DiagnosticsError(
                "attn_mask holds values other than 0 and 'hidden' (-1e4 or less): a real-valued bias adds a term that "
                "the fused kernel does not return; use diagnostics.measure.attention.observe_rows(bias=...) instead"
            )
    return hidden.reshape((1,) * (4 - hidden.ndim) + hidden.shape)


def _attend(
    q_bhtk: Tensor, k_bhsk: Tensor, scale: float, hidden: Tensor | None, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention with V := K: (output, log-sum-exp)."""
    additive = (
        None
        if hidden is None
        else torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, -torch.inf)
    )
    if q_bhtk.device.type == "cpu":
        output_bhtk, lse_bht = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # noqa: SLF001 - the only way to the log-sum-exp
            q_bhtk.contiguous(),
            k_bhsk.contiguous(),
            k_bhsk.contiguous(),
            0.0,
            is_causal,
            attn_mask=additive,
            scale=scale,
        )
        return output_bhtk, lse_bht
    if q_bhtk.device.type == "cuda":
        return _efficient_cuda(q_bhtk, k_bhsk, scale, additive, is_causal=is_causal)
    return blockwise_attention(q_bhtk, k_bhsk, scale, additive, is_causal=is_causal)


def _efficient_cuda(
    q_bhtk: Tensor, k_bhsk: Tensor, scale: float, additive: Tensor | None, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    rows, keys, channels = q_bhtk.shape[2], k_bhsk.shape[2], q_bhtk.shape[3]
    # The kernel wants 16-byte rows: zero channels add nothing to q.k, and the mask is a view into padded rows.
    q_bhtk = F.pad(q_bhtk, (0, -channels % 8)).contiguous()
    k_bhsk = F.pad(k_bhsk, (0, -channels % 8)).contiguous()
    if additive is not None:
        padded = F.pad(additive.expand(*additive.shape[:-1], keys), (0, -keys % 8))
        additive = padded[..., :keys].expand(*q_bhtk.shape[:3], keys)
    output_bhtk, lse_bht, _, _ = torch.ops.aten._scaled_dot_product_efficient_attention(  # noqa: SLF001 - as above
        q_bhtk,
        k_bhsk,
        k_bhsk,
        additive,
        compute_log_sumexp=True,
        dropout_p=0.0,
        is_causal=is_causal,
        scale=scale,
    )
    # CUDA rounds the rows of the log-sum-exp up to a multiple of 32.
    return output_bhtk[..., :channels], lse_bht[..., :rows]


def blockwise_attention(
    q_bhtk: Tensor, k_bhsk: Tensor, scale: float, additive: Tensor | None, *, is_causal: bool
) -> tuple[Tensor, Tensor]:
    """The same in plain operations, a block of query rows at a time, for devices without a kernel that serves.

    Args:
        q_bhtk: float32 queries.
        k_bhsk: float32 keys, as many heads.
        scale: what q.k is multiplied by.
        additive: 0 or -inf, four axes, broadcastable to (B, H, T, S).
        is_causal: row i sees the keys 0 to i.

    Returns:
        sum_j p_j k_j per row (B, H, T, K), and the log-sum-exp of its logits (B, H, T).
    """
    batch, heads, rows, _ = q_bhtk.shape
    keys = k_bhsk.shape[2]
    block = max(1, BLOCK_LOGITS // (batch * heads * keys))
    key_s = torch.arange(keys, device=q_bhtk.device)
    outputs, sums = [], []
    for first in range(0, rows, block):
        last = min(first + block, rows)
        logits_bhns = scale * (q_bhtk[:, :, first:last] @ k_bhsk.mT)
        if additive is not None:
            logits_bhns += additive if additive.shape[2] == 1 else additive[:, :, first:last]
        if is_causal:
            row_n1 = torch.arange(first, last, device=q_bhtk.device)[:, None]
            logits_bhns.masked_fill_(key_s > row_n1, -torch.inf)
        # Weights relative to the largest, divided by their sum at the end: exp(logit - lse) would inherit the
        # rounding of the log-sum-exp, 3e-5 where it is 500.
        max_bhn1 = logits_bhns.amax(-1, keepdim=True)
        weights_bhns = (logits_bhns - max_bhn1).exp_()
        total_bhn1 = weights_bhns.sum(-1, keepdim=True)
        outputs.append((weights_bhns @ k_bhsk).div_(total_bhn1))
        sums.append((max_bhn1 + total_bhn1.log())[..., 0])
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)
