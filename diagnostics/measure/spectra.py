"""Singular values of Wq_h^T Wk_h for each head, and how their energy is spread.

Shape suffixes: h query head, g key head, k row of a head (d_head), d input width, r rows of a factor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.measure.precision import full_precision

# A Cholesky factor whose diagonal spans more than this is taken from a QR of the weights instead: forming the
# Gram squares the condition number, and beyond it the smallest singular values lose float32's own digits.
SAFE_DIAGONAL_RATIO = 1e-4


AXES = 3  # head, row, width


@dataclass(frozen=True)
class HeadSpectra:
    """Spectrum of Wq_h^T Wk_h by query head, float64 on the weights' device.

    Attributes:
        sigma1_h: largest singular value.
        frobenius_h: Frobenius norm.
        sec_1_h: share of the energy sum(sigma^2) in the largest singular value (arXiv 2505.21910, SEC with s = 1).
        sec_4_h: the same for the 4 largest.
        sec_10_h: the same for the 10 largest.
        stable_rank_h: squared Frobenius norm / squared sigma1.
        effective_rank_h: exp of the entropy of sigma / sum(sigma) (Roy and Vetterli 2007).
        singular_values_hk: all min(d_head, Dq, Dk) of them, descending; 0 where below rounding.

    A product that is zero has sigma1 and norm 0, and NaN for shares and ranks, which it does not have.
    A head with a non-finite weight is NaN throughout.
    """

    sigma1_h: Tensor
    frobenius_h: Tensor
    sec_1_h: Tensor
    sec_4_h: Tensor
    sec_10_h: Tensor
    stable_rank_h: Tensor
    effective_rank_h: Tensor
    singular_values_hk: Tensor


def head_spectra(wq_hkd: Tensor, wk_gkd: Tensor, kv_head_h: Tensor | None = None) -> HeadSpectra:
    """Singular values of each head's Wq_h^T Wk_h (Dq x Dk), without ever forming that product.

    With Gram matrices Wq Wq^T = Lq Lq^T and Wk Wk^T = Lk Lk^T the small matrix Lq^T Lk has the same non-zero
    singular values. All in float64; one factor per key head, shared by its query heads.

    How small a singular value can be trusted (measured): the relative error of the largest is below 1e-13; a
    well-conditioned head (the rule) keeps 1e-8 or better down to its smallest. A head whose Gram is close to
    singular is factored by QR, so that absolute errors stay below about 1e-15 * |Wq_h| * |Wk_h|; values under
    8 eps |Wq_h|_F |Wk_h|_F are rounding noise and reported as exactly 0.
    On CUDA the singular value solver synchronises; call this on measured steps only.

    Args:
        wq_hkd: query weights (H, d_head, Dq), any float dtype, no bias, no RoPE.
        wk_gkd: key weights (G, d_head, Dk); Dk may differ from Dq (cross attention).
        kv_head_h: (H,) integers, the key head each query head is paired with; None where G == H, one to one.

    Raises:
        DiagnosticsError: the shapes do not fit together, or `kv_head_h` names a key head there is not.
    """
    pairing_h = _checked_pairing(wq_hkd, wk_gkd, kv_head_h)
    with full_precision(wq_hkd.device):
        # Metal has no float64; these matrices are small enough to be taken to the processor.
        if wq_hkd.device.type == "mps":
            wq_hkd, wk_gkd, pairing_h = wq_hkd.cpu(), wk_gkd.cpu(), pairing_h.cpu()
        lq_hkr, norm_q_h, finite_q_h = _factors(wq_hkd)
        lk_gkr, norm_k_g, finite_k_g = _factors(wk_gkd)
        sigma_hk = torch.linalg.svdvals(lq_hkr.mT @ lk_gkr[pairing_h])
        noise_h = 8 * torch.finfo(torch.float64).eps * norm_q_h * norm_k_g[pairing_h]
        sigma_hk = sigma_hk.masked_fill(sigma_hk <= noise_h[:, None], 0.0)
        sigma_hk = sigma_hk.masked_fill(~(finite_q_h & finite_k_g[pairing_h])[:, None], torch.nan)
        return _summary(sigma_hk)


def _checked_pairing(wq_hkd: Tensor, wk_gkd: Tensor, kv_head_h: Tensor | None) -> Tensor:
    if (
        not wq_hkd.ndim == wk_gkd.ndim == AXES
        or wq_hkd.shape[1] != wk_gkd.shape[1]
        or 0 in wq_hkd.shape + wk_gkd.shape
    ):
        raise DiagnosticsError(
            f"head weights have shapes {tuple(wq_hkd.shape)} and {tuple(wk_gkd.shape)}; they must be "
            "(heads, d_head, width), none of them 0, with the same d_head: split the weights by head first"
        )
    heads, kv_heads = wq_hkd.shape[0], wk_gkd.shape[0]
    if kv_head_h is None:
        if heads != kv_heads:
            raise DiagnosticsError(
                f"{heads} query heads and {kv_heads} key heads: pass kv_head_h, the key head of each query head"
            )
        return torch.arange(heads, device=wq_hkd.device)
    pairing = kv_head_h.tolist()
    if len(pairing) != heads or any(not 0 <= kv_head < kv_heads for kv_head in pairing):
        raise DiagnosticsError(
            f"kv_head_h is {pairing}; it must hold {heads} numbers from 0 to {kv_heads - 1}"
        )
    return kv_head_h.to(wq_hkd.device, torch.int64)


def _factors(w_hkd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per head: L with L L^T = W W^T, the Frobenius norm of W, and whether W is finite (L is 0 where it is not)."""
    _, rows, width = w_hkd.shape
    if width <= rows:
        # W itself is the smaller factor, and exact.
        factor_hkr = w_hkd.double()
        finite_h = factor_hkr.isfinite().all(-1).all(-1)
        factor_hkr = torch.where(finite_h[:, None, None], factor_hkr, 0.0)
        return factor_hkr, torch.linalg.matrix_norm(factor_hkr), finite_h
    # Head by head: a float64 copy of one head at a time instead of the whole layer's.
    gram_hkk = torch.stack([wide_kd @ wide_kd.mT for wide_kd in (w_kd.double() for w_kd in w_hkd)])
    finite_h = gram_hkk.diagonal(dim1=-2, dim2=-1).sum(-1).isfinite()
    gram_hkk = torch.where(finite_h[:, None, None], gram_hkk, 0.0)
    factor_hkk, info_h = torch.linalg.cholesky_ex(gram_hkk)
    diagonal_hk = factor_hkk.diagonal(dim1=-2, dim2=-1)
    unsafe_h = (info_h != 0) | ~(diagonal_hk.amin(-1) > SAFE_DIAGONAL_RATIO * diagonal_hk.amax(-1))
    for head in (unsafe_h & finite_h).nonzero().flatten().tolist():
        factor_hkk[head] = torch.linalg.qr(w_hkd[head].double().mT, mode="r").R.mT
    factor_hkk = torch.where(finite_h[:, None, None], factor_hkk, 0.0)
    return factor_hkk, gram_hkk.diagonal(dim1=-2, dim2=-1).sum(-1).sqrt(), finite_h


def _summary(sigma_hk: Tensor) -> HeadSpectra:
    sigma1_h = sigma_hk[:, 0]
    # Relative to sigma1, so that squares neither overflow nor vanish; 0 / 0 is the NaN of a zero product.
    relative_hk = sigma_hk / sigma1_h[:, None]
    energy_hk = relative_hk.square()
    total_h = energy_hk.sum(-1)
    share_hk = relative_hk / relative_hk.sum(-1, keepdim=True)
    return HeadSpectra(
        sigma1_h=sigma1_h,
        frobenius_h=torch.linalg.vector_norm(sigma_hk, dim=-1),
        sec_1_h=energy_hk[:, 0] / total_h,
        sec_4_h=energy_hk[:, :4].sum(-1) / total_h,
        sec_10_h=energy_hk[:, :10].sum(-1) / total_h,
        stable_rank_h=total_h,
        effective_rank_h=torch.special.entr(share_hk).sum(-1).exp(),
        singular_values_hk=sigma_hk,
    )
