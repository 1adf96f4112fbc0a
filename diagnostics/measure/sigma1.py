"""The largest singular value of many matrices of one shape, warm-started from the step before.

Shape suffixes: b matrix, m row, n column, j and i Lanczos step.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.measure.precision import full_precision

# Share of a fixed direction in a warm start: without it a start that is a singular vector would stay one for
# ever, although another has overtaken it. Lanczos makes good for what it costs within a step or two.
MIXED_IN = 0.1
# The projected B^T B is raised to the power 8^5 = 2^15: two Ritz values 0.1 % apart are told apart to 1e-14, and of
# closer ones either is right to 1e-4.
EIGHTH_POWERS = 5
# Least divisor, so that 0 / 0 is 0: float32's smallest normal number.
TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sigma1:
    """Largest singular values: a lower estimate, the vector to start from next time, and how good it is.

    Attributes:
        value_b: sigma1, in the working dtype; 0 for a zero matrix, NaN for a non-finite one.
        vector_bn: unit right vector v; A v = value * u. NaN for a non-finite matrix.
        residual_b: |A^T u - value v| / value. Some singular value lies within residual * value of `value`; the
            error itself is of the order of the residual's square over the relative gap.
    """

    value_b: Tensor
    vector_bn: Tensor
    residual_b: Tensor


def largest_singular_value(
    a_bmn: Tensor,
    start_bn: Tensor | None = None,
    *,
    steps: int = 8,
    tolerance: float | None = 1e-3,
    max_cycles: int = 10,
) -> Sigma1:
    """sigma1 of each matrix by Golub-Kahan-Lanczos bidiagonalisation.

    Plain power iteration keeps only its last vector, so it crawls on flat spectra, and a value that is too low
    tightens the spectral bound for W and loosens it for dW. Lanczos picks the best vector out of the span of all
    the products seen, at the same two products with A per step (Golub and Kahan 1965; one-sided
    reorthogonalisation after Simon and Zha 2000). Cycles of `steps` extend one and the same Krylov space until
    the residual meets the tolerance, so that nothing is lost to a restart.

    Relative errors measured against svdvals (Gaussian, sign, low rank with noise, power law, top two 0.1 % apart,
    flat edge; 16 x 16 to 4096 x 1024): cold start to the default tolerance 2e-5 at worst, after 8 to 64 steps. A
    cold start of 8 steps alone is still up to 5e-2 low on Gaussian matrices (power iteration: 7e-2). After a
    relative change of 1e-3 of the matrix a warm start is right to 2e-4 in 2 steps and 5e-5 in 3. A start that is
    exactly some other singular vector, less than 2 % below the top one, may cost that gap in one or two calls.

    Arithmetic is float32 (float64 for float64 input). The global random state is untouched: starts are mixed
    with a fixed direction. On CUDA the only synchronisation is the convergence test once per cycle;
    `tolerance=None` makes exactly one cycle and none.

    Args:
        a_bmn: matrices (B, m, n), any float dtype.
        start_bn: right vectors to start from, such as the last call's `vector_bn`; rows that are zero or not
            finite are ignored. None: cold start.
        steps: Lanczos steps per cycle, two products with A each.
        tolerance: residual at which to stop; None: after one cycle.
        max_cycles: cycles at most; `residual_b` then says how far it came.

    Raises:
        DiagnosticsError: shapes that do not fit, or steps or max_cycles below 1.
    """
    if a_bmn.ndim != 3 or 0 in a_bmn.shape[1:]:  # noqa: PLR2004 - a batch of matrices
        raise DiagnosticsError(
            f"a_bmn has shape {tuple(a_bmn.shape)}; it must be (batch, rows, columns), none empty"
        )
    if start_bn is not None and start_bn.shape != (a_bmn.shape[0], a_bmn.shape[2]):
        raise DiagnosticsError(
            f"start_bn has shape {tuple(start_bn.shape)}; it must be {(a_bmn.shape[0], a_bmn.shape[2])}, or None"
        )
    if steps < 1 or max_cycles < 1:
        raise DiagnosticsError(f"steps is {steps} and max_cycles {max_cycles}; both must be at least 1")
    with full_precision(a_bmn.device):
        a_bmn = a_bmn if a_bmn.dtype == torch.float64 else a_bmn.float()
        # Exact after min(m, n) steps, and one more where the start has a part in the null space.
        limit = min(a_bmn.shape[1] + 1, a_bmn.shape[2], steps * (1 if tolerance is None else max_cycles))
        krylov = _Krylov(a_bmn, _start(a_bmn, start_bn), limit)
        while True:
            for _ in range(min(steps, limit - krylov.size)):
                krylov.extend()
            estimate = krylov.ritz()
            if krylov.size == limit or tolerance is None or not bool((estimate.residual_b > tolerance).any()):
                return estimate


class _Krylov:
    """A V_j = U_j B_j with B_j upper bidiagonal, grown a step at a time; the U need not be kept."""

    def __init__(self, a_bmn: Tensor, v_bn: Tensor, limit: int) -> None:
        batch, rows, columns = a_bmn.shape
        self.a_bmn = a_bmn
        self.size = 0
        self.v_bjn = a_bmn.new_empty((batch, limit, columns))
        self.v_bn, self.u_bm = v_bn, a_bmn.new_zeros((batch, rows))
        self.largest_b = a_bmn.new_zeros(batch)
        self.diagonal_b: list[Tensor] = []
        self.above_b: list[Tensor] = [a_bmn.new_zeros(batch)]

    def extend(self) -> None:
        self.v_bjn[:, self.size] = self.v_bn
        self.size += 1
        basis_bjn = self.v_bjn[:, : self.size]
        # Row vector times matrix, both ways: on a CPU bmm is up to ten times slower on a column vector.
        w_bm = torch.bmm(self.v_bn[:, None], self.a_bmn.mT)[:, 0] - self.above_b[-1][:, None] * self.u_bm
        self.u_bm, diagonal_b = self._continued(w_bm)
        z_b1n = torch.bmm(self.u_bm[:, None], self.a_bmn)
        for _ in range(2):  # once would let rounding back in, and values far above sigma1 with it
            z_b1n = torch.baddbmm(z_b1n, torch.bmm(z_b1n, basis_bjn.mT), basis_bjn, alpha=-1)
        self.v_bn, above_b = self._continued(z_b1n[:, 0])
        self.diagonal_b.append(diagonal_b)
        self.above_b.append(above_b)

    def _continued(self, x_bn: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors and lengths; both 0 where all that is left is rounding: there the space is exhausted.

        A normalised remainder of rounding need not be orthogonal to what came before it, and B would gain
        singular values that A does not have.
        """
        unit_bn, length_b = _unit(x_bn)
        exhausted_b = length_b <= 16 * torch.finfo(x_bn.dtype).eps * self.largest_b
        self.largest_b = torch.maximum(self.largest_b, length_b)
        return unit_bn.masked_fill(exhausted_b[:, None], 0.0), length_b.masked_fill(exhausted_b, 0.0)

    def ritz(self) -> Sigma1:
        """Top singular triplet of B by repeated squaring of B^T B: batched, and no LAPACK call that synchronises."""
        wide = _wide(self.a_bmn)
        b_bjj = torch.diag_embed(torch.stack(self.diagonal_b, dim=1).to(wide))
        if self.size > 1:
            b_bjj += torch.diag_embed(torch.stack(self.above_b[1:-1], dim=1).to(wide), offset=1)
        peak_b = b_bjj.amax((-2, -1))
        b_bjj = b_bjj / peak_b.clamp(min=TINY)[:, None, None]
        m_bjj = b_bjj.mT @ b_bjj
        for _ in range(EIGHTH_POWERS):
            m_bjj = torch.linalg.matrix_power(_of_unit_trace(m_bjj), 8)
        # m is now y y^T up to scale: its column with the largest diagonal entry is the best y.
        column_b = m_bjj.diagonal(dim1=-2, dim2=-1).argmax(-1)
        y_bj, _ = _unit(torch.take_along_dim(m_bjj, column_b[:, None, None], dim=2)[..., 0])
        x_bj, value_b = _unit((b_bjj @ y_bj[..., None])[..., 0])
        inside_bj = (b_bjj.mT @ x_bj[..., None])[..., 0] - value_b[:, None] * y_bj
        outside_b = self.above_b[-1] / peak_b.clamp(min=TINY) * x_bj[:, -1]
        residual_b = torch.hypot(torch.linalg.vector_norm(inside_bj, dim=-1), outside_b) / value_b.clamp(
            min=TINY
        )
        value_b = value_b * peak_b
        dtype = self.a_bmn.dtype
        vector_bn, _ = _unit(torch.bmm(y_bj[:, None].to(dtype), self.v_bjn[:, : self.size])[:, 0])
        return Sigma1(value_b.to(dtype), vector_bn, residual_b.to(dtype))


def _start(a_bmn: Tensor, start_bn: Tensor | None) -> Tensor:
    # A chirp: without pattern, the same on every device, and no more parallel to one wave than to another.
    index_n = torch.arange(1, a_bmn.shape[2] + 1, device=a_bmn.device, dtype=_wide(a_bmn))
    fixed_bn = index_n.square().mul_(math.sqrt(2.0)).cos_().to(a_bmn.dtype).expand(a_bmn.shape[0], -1)
    fixed_bn, _ = _unit(fixed_bn)
    if start_bn is None:
        return fixed_bn
    usable_bn, _ = _unit(start_bn.to(a_bmn).nan_to_num(0.0, 0.0, 0.0))
    return _unit(usable_bn + MIXED_IN * fixed_bn)[0]


def _unit(x_bn: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1 and their lengths; a zero row stays zero. Squares in float64: weights of 1e-25 have norms too."""
    length_b = torch.linalg.vector_norm(x_bn, dim=-1, dtype=_wide(x_bn)).to(x_bn.dtype)
    return x_bn / length_b.clamp(min=TINY)[:, None], length_b


def _of_unit_trace(m_bjj: Tensor) -> Tensor:
    return m_bjj / m_bjj.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=TINY)[:, None, None]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float32 if x.device.type == "mps" else torch.float64  # Metal has no float64
