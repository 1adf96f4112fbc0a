"""Slow float64 answers to what diagnostics.measure computes, from the definitions and with numpy only."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def array(x: torch.Tensor) -> Array:
    return np.asarray(x.detach().double().numpy(), dtype=np.float64)


def singular_values(matrix: Array) -> Array:
    return np.asarray(np.linalg.svd(matrix, compute_uv=False), dtype=np.float64)


def product_singular_values(wq_hkd: torch.Tensor, wk_gkd: torch.Tensor, kv_head_h: list[int]) -> Array:
    """Of the full Dq x Dk products, head by head; as many as can be non-zero."""
    length = min(wq_hkd.shape[1], wq_hkd.shape[2], wk_gkd.shape[2])
    wq, wk = array(wq_hkd), array(wk_gkd)
    return np.stack([singular_values(wq[h].T @ wk[g])[:length] for h, g in enumerate(kv_head_h)])


def effective_rank(sigma: Array) -> float:
    share = sigma[sigma > 0] / sigma.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def entropy(logits: Array) -> float:
    """Of softmax over these logits alone, nats."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


@dataclass
class Rows:
    """Lists over (b, h, r) of what one visible row gives."""

    entropy: dict[tuple[int, int, int], float]
    visible: dict[tuple[int, int, int], int]
    norm: dict[tuple[int, int, int], float]
    largest: dict[tuple[int, int, int], float]
    maps: Array


def attention_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float,
    visible: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
) -> Rows:
    """Row by row: logits over the visible keys only, then their softmax, entropy and centred norm."""
    batch, heads, rows, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    shape = (batch, heads, rows, keys)
    seen = np.ones(shape, dtype=bool) if visible is None else np.broadcast_to(visible.numpy(), shape)
    added = np.zeros(shape) if bias is None else np.broadcast_to(array(bias), shape)
    wide_q, wide_k = array(q), array(k)
    result = Rows({}, {}, {}, {}, np.zeros(shape))
    for b, h, r in np.ndindex(batch, heads, rows):
        with np.errstate(invalid="ignore"):
            logits = scale * wide_k[b, h // (heads // kv_heads)] @ wide_q[b, h, r]
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        keep = seen[b, h, r]
        logits = (logits + added[b, h, r])[keep]
        if not keep.any() or not np.isfinite(logits).all():
            continue
        result.entropy[b, h, r] = entropy(logits)
        result.visible[b, h, r] = int(keep.sum())
        result.norm[b, h, r] = float(np.linalg.norm(logits - logits.mean()))
        result.largest[b, h, r] = float(logits.max())
        p = np.exp(logits - logits.max())
        result.maps[b, h, r, keep] = p / p.sum()
    return result


def least_entropy(keys: int, norm: float) -> float:
    """Smallest softmax entropy over rows of `keys` logits with 2-norm `norm`: gradient descent on the sphere."""
    starts = np.random.default_rng(0).standard_normal((8, keys))
    found = []
    for start in starts:
        row = start / np.linalg.norm(start) * norm
        for _ in range(4000):
            p = np.exp(row - row.max())
            p /= p.sum()
            row = row + 0.5 * p * (np.log(p) + entropy(row))  # minus the gradient of -sum p ln p
            row *= norm / np.linalg.norm(row)
        found.append(entropy(row))
    return min(found)
