"""Statistics of softmax attention on a sample of query rows, per head.

Shape suffixes: b sequence, h query head, g key head, r observed query row, s key, k head channel.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.measure.precision import full_precision
from diagnostics.measure.shapes import check_query_key_shapes

# Model code writes "hidden" as -inf, as finfo.min of its dtype (-65504 in float16), or as -1e4 by hand; a bias
# that low leaves a key without weight in float32 whatever its logit.
HIDDEN_BIAS = -1e4
# The same once added to a logit: a model that writes attention out shows only the sum.
HIDDEN_LOGIT = -9e3


@dataclass(frozen=True)
class RowStatistics:
    """Attention statistics by query head over the valid observed rows; NaN where a head has none.

    A row is valid if it sees at least one key and all its visible logits are finite.

    Attributes:
        entropy_h: mean entropy, nats, float32.
        entropy_min_h: lowest entropy, nats, float32.
        entropy_frac_h: mean of entropy / ln(visible keys) over rows with two visible keys or more, float32.
        entropy_bound_h: lowest of the rows' Theorem 3.1 bounds (`entropy_lower_bound`), nats, float32; never
            above `entropy_min_h` but for rounding.
        max_logit_h: largest scaled logit of a visible key, bias and soft-cap included, float32.
        rank_frac_h: effective rank (Roy and Vetterli 2007) of a sequence's attention map / its valid rows, float32.
        rows_h: valid rows, counted over all sequences, int32.
    """

    entropy_h: Tensor
    entropy_min_h: Tensor
    entropy_frac_h: Tensor
    entropy_bound_h: Tensor
    max_logit_h: Tensor
    rank_frac_h: Tensor
    rows_h: Tensor


def observe_rows(
    q_bhrk: Tensor,
    k_bgsk: Tensor,
    *,
    scale: float,
    visible: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    rank_sequences: int = 1,
) -> RowStatistics:
    """Entropy, its lower bound, largest logit and rank of the attention of R observed query rows.

    Forms the (B, H, R, S) logits in float32; choose R rows so that this is small beside the model's own work.
    The logits of a row are scale * q k^T, soft-capped, plus bias, over its visible keys. Query head h is paired
    with key head h // (H / G).

    Args:
        q_bhrk: the observed rows of the queries as they enter attention (after RoPE and norms), any float dtype.
        k_bgsk: all keys, G dividing H.
        scale: what q.k is multiplied by.
        visible: bool, broadcastable to (B, H, R, S), True where a key is seen; None: all are.
        bias: float, broadcastable likewise, added after scaling and soft-cap; entries of -1e4 and below hide.
        softcap: c in c * tanh(logit / c), applied before bias and mask; None: no cap.
        rank_sequences: `rank_frac_h` is the mean over this many first sequences (its cost is a float64
            eigenvalue problem of R x R each).

    Raises:
        DiagnosticsError: the shapes do not fit together.
    """
    check_query_key_shapes(q_bhrk, k_bgsk)
    with full_precision(q_bhrk.device):
        logits_bhrs = _logits(q_bhrk, k_bgsk, scale, softcap)
        if bias is not None:
            hidden = bias <= HIDDEN_BIAS
            logits_bhrs += bias.float().masked_fill(hidden, 0.0)
            visible = ~hidden if visible is None else visible & ~hidden
        if logits_bhrs.numel() == 0:
            return _nothing_observed(q_bhrk)
        return _statistics(logits_bhrs, visible, rank_sequences)


def observe_logits(logits_bhrs: Tensor, *, sinks: int = 0, rank_sequences: int = 1) -> RowStatistics:
    """As `observe_rows`, from logits that a model has computed itself, mask and bias added.

    Args:
        logits_bhrs: the softmax's input on the observed rows, any float dtype; entries of -9e3 and below are
            keys that a mask hides.
        sinks: so many last columns are attention sinks: they take weight, and so count for the entropy, but are
            no product of a query and a key, and so no largest logit.
        rank_sequences: as in `observe_rows`.
    """
    with full_precision(logits_bhrs.device):
        wide_bhrs = logits_bhrs.detach().float()
        if wide_bhrs is logits_bhrs or wide_bhrs.data_ptr() == logits_bhrs.data_ptr():
            wide_bhrs = wide_bhrs.clone()  # the statistics are made in place, and these are the model's own
        if wide_bhrs.numel() == 0:
            return _nothing_observed(logits_bhrs)
        largest_bhr = wide_bhrs[..., : wide_bhrs.shape[-1] - sinks].amax(-1)
        statistics = _statistics(wide_bhrs, wide_bhrs > HIDDEN_LOGIT, rank_sequences)
        if not sinks:
            return statistics
        seen_bhr = largest_bhr.isfinite() & (largest_bhr > HIDDEN_LOGIT)
        return replace(statistics, max_logit_h=-_lowest(-largest_bhr, seen_bhr))


def entropy_lower_bound(row_norm: Tensor, visible_keys: Tensor) -> Tensor:
    """The least entropy (nats) that softmax can have on a row of logits of this 2-norm: Theorem 3.1 of arXiv 2303.06296.

    With T keys and norm S, beta = exp(-S sqrt(T / (T - 1))):

        log(1 + (T - 1) beta) + S sqrt(T (T - 1)) beta / (1 + (T - 1) beta)

    The paper states it with S a product of matrix norms; its proof needs only S >= the norm of the row, which is
    far tighter. Softmax ignores a common offset, so the norm of the centred row is tighter still, and valid.

    Args:
        row_norm: 2-norm of the (centred) scaled logits over the visible keys, >= 0, any shape.
        visible_keys: number of visible keys, broadcastable to it. One key: 0. No key: NaN.
    """
    others = (visible_keys - 1).to(row_norm.dtype).clamp(min=1.0)
    keys = others + 1
    # Far beyond this the bound is 0 in any float; the clamp keeps inf * 0 away.
    norm = row_norm.clamp(max=1e6)
    beta = torch.exp(-norm * torch.sqrt(keys / others))
    bound = torch.log1p(others * beta) + norm * beta * torch.sqrt(keys * others) / (1 + others * beta)
    bound = torch.where(visible_keys == 1, 0.0 * norm, bound)
    return bound.masked_fill(visible_keys < 1, torch.nan)


def _logits(q_bhrk: Tensor, k_bgsk: Tensor, scale: float, softcap: float | None) -> Tensor:
    batch, heads, rows, channels = q_bhrk.shape
    kv_heads, keys = k_bgsk.shape[1:3]
    # The query heads of one key head are laid end to end, so that no key is copied for grouped-query attention.
    q_bgnk = (q_bhrk.float() * scale).reshape(batch, kv_heads, heads // kv_heads * rows, channels)
    logits_bhrs = (q_bgnk @ k_bgsk.float().mT).reshape(batch, heads, rows, keys)
    return logits_bhrs if softcap is None else logits_bhrs.div_(softcap).tanh_().mul_(softcap)


def _statistics(logits_bhrs: Tensor, visible: Tensor | None, rank_sequences: int) -> RowStatistics:
    # In place throughout: on a CPU the page faults of fresh (B, H, R, S) tensors cost more than the arithmetic.
    rows_shape, keys = logits_bhrs.shape[:-1], logits_bhrs.shape[-1]
    if visible is None:
        count_bhr = torch.full((1, 1, 1), keys, device=logits_bhrs.device).expand(rows_shape)
        seen = None
    else:
        visible = visible.expand(*visible.shape[:-1], keys)
        count_bhr = visible.sum(-1).expand(rows_shape)
        seen = visible.float()
        # Finite, so that 0 * hidden below stays 0; -inf is left to mean a logit that is really -inf.
        logits_bhrs.masked_fill_(~visible, -1e30)
    max_bhr = logits_bhrs.amax(-1)
    logits_bhrs -= max_bhr[..., None]
    # Floored where exp is still a normal number (1e-35): its underflow path is ten times slower.
    floored_bhrs = logits_bhrs.clamp(min=-80.0)
    weight_bhrs = floored_bhrs.exp()
    total_bhr = weight_bhrs.sum(-1)
    entropy_bhr = total_bhr.log() - floored_bhrs.mul_(weight_bhrs).sum(-1) / total_bhr
    norm_bhr = _centred_norm(logits_bhrs, seen, count_bhr)
    valid_bhr = (count_bhr > 0) & entropy_bhr.isfinite() & norm_bhr.isfinite()
    entropy_bhr = entropy_bhr.clamp(min=0.0)
    several_bhr = valid_bhr & (count_bhr > 1)
    frac_bhr = entropy_bhr / count_bhr.clamp(min=2).log()
    weight_bhrs = weight_bhrs[:rank_sequences].div_(total_bhr[:rank_sequences, ..., None])
    return RowStatistics(
        entropy_h=_mean(entropy_bhr, valid_bhr),
        entropy_min_h=_lowest(entropy_bhr, valid_bhr),
        entropy_frac_h=_mean(frac_bhr, several_bhr),
        entropy_bound_h=_lowest(entropy_lower_bound(norm_bhr, count_bhr), valid_bhr),
        max_logit_h=-_lowest(-max_bhr, valid_bhr),
        rank_frac_h=_rank_frac(weight_bhrs, valid_bhr[:rank_sequences]),
        rows_h=valid_bhr.sum((0, 2), dtype=torch.int32),
    )


def _centred_norm(logits_bhrs: Tensor, seen: Tensor | None, count_bhr: Tensor) -> Tensor:
    """2-norm of each row less its mean, over visible keys; overwrites the logits."""
    # Two passes: the one-pass formula cancels to 4 digits on a row with a single high logit, the very row on
    # which the bound is tight.
    if seen is not None:
        logits_bhrs *= seen
    logits_bhrs -= (logits_bhrs.sum(-1) / count_bhr)[..., None]
    if seen is not None:
        logits_bhrs *= seen
    norm_bhr: Tensor = torch.linalg.vector_norm(logits_bhrs, dim=-1)
    return norm_bhr


def _mean(value_bhr: Tensor, valid_bhr: Tensor) -> Tensor:
    return torch.where(valid_bhr, value_bhr, 0.0).sum((0, 2)) / valid_bhr.sum((0, 2))


def _lowest(value_bhr: Tensor, valid_bhr: Tensor) -> Tensor:
    lowest_h = torch.where(valid_bhr, value_bhr, torch.inf).amin((0, 2))
    return lowest_h.masked_fill(~valid_bhr.any(0).any(-1), torch.nan)


def _rank_frac(map_bhrs: Tensor, valid_bhr: Tensor) -> Tensor:
    """Mean over sequences of effective rank / valid rows, from the eigenvalues of the smaller float64 Gram.

    Three times faster than singular values of the map. The Gram's rounding, 1e-16, is 1e-8 in a singular value:
    lost in float32. A float32 Gram would add 2e-4 to each of them and call a rank-1 map of 256 rows rank 1.5.
    """
    if map_bhrs.device.type == "mps":  # no float64 there
        return _rank_frac(map_bhrs.cpu(), valid_bhr.cpu()).to(map_bhrs.device)
    wide_bhrs = torch.where(valid_bhr[..., None], map_bhrs, 0.0).double()
    gram_bhnn = (
        wide_bhrs @ wide_bhrs.mT if wide_bhrs.shape[2] <= wide_bhrs.shape[3] else wide_bhrs.mT @ wide_bhrs
    )
    energy_bhn = torch.linalg.eigvalsh(gram_bhnn)
    noise_bh1 = energy_bhn[..., -1:] * gram_bhnn.shape[-1] * torch.finfo(torch.float64).eps
    sigma_bhn = energy_bhn.masked_fill(energy_bhn <= noise_bh1, 0.0).sqrt()
    share_bhn = sigma_bhn / sigma_bhn.sum(-1, keepdim=True)
    rank_bh = torch.special.entr(share_bhn).sum(-1).exp()
    rows_bh = valid_bhr.sum(-1)
    return _mean((rank_bh / rows_bh)[..., None], (rows_bh > 0)[..., None]).float()


def _nothing_observed(q_bhrk: Tensor) -> RowStatistics:
    heads = q_bhrk.shape[1]
    unknown_h = torch.full((heads,), torch.nan, device=q_bhrk.device)
    none_h = torch.zeros(heads, dtype=torch.int32, device=q_bhrk.device)
    return RowStatistics(unknown_h, unknown_h, unknown_h, unknown_h, unknown_h, unknown_h, none_h)
