"""The largest singular value of many matrices of one shape, warm-started from the step before.

Shape suffixes: b matrix, m row, n column, j and i Lanczos step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.measure.precision import full_precision

# Share of a fixed direction in a warm start: without it a start that is a singular vector would stay one for
# ever, although another has overtaken it. Lanczos makes good for what it costs within a step or two.
MIXED_IN = 0.1
# B^T B of the projected problem is raised to the power 2^14: two Ritz values 0.1 % apart are told apart to 1e-14,
# and of closer ones either is right to 1e-4.
SQUARINGS = 14


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

    Power iteration keeps only its last vector, which is why it is so slow on flat spectra: after 8 iterations it
    is 4 % low on a 256 x 256 Gaussian matrix, which would tighten the spectral bound for W and loosen it for dW.
    Lanczos takes the best vector out of the span of all of them at the same two products with A per step, and
    has sharp convergence (Golub and Kahan 1965; one-sided reorthogonalisation after Simon and Zha 2000).
    Cycles of `steps` extend the same Krylov space until the residual meets the tolerance, so that no step is lost
    to a restart. Measured in tests/bench/measurements.py.

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
        self.diagonal_b: list[Tensor] = []
        self.above_b: list[Tensor] = [a_bmn.new_zeros(batch)]

    def extend(self) -> None:
        self.v_bjn[:, self.size] = self.v_bn
        self.size += 1
        basis_bjn = self.v_bjn[:, : self.size]
        # Row vector times matrix, both ways: on a CPU bmm is up to ten times slower on a column vector.
        w_bm = torch.bmm(self.v_bn[:, None], self.a_bmn.mT)[:, 0] - self.above_b[-1][:, None] * self.u_bm
        self.u_bm, diagonal_b = _unit(w_bm)
        z_b1n = torch.bmm(self.u_bm[:, None], self.a_bmn)
        for _ in range(2):  # twice is enough (Parlett): V stays orthonormal to rounding
            z_b1n = z_b1n - torch.bmm(torch.bmm(z_b1n, basis_bjn.mT), basis_bjn)
        self.v_bn, above_b = _unit(z_b1n[:, 0])
        self.diagonal_b.append(diagonal_b)
        self.above_b.append(above_b)

    def ritz(self) -> Sigma1:
        """Top singular triplet of B by repeated squaring of B^T B: batched, and no LAPACK call that synchronises."""
        wide = torch.float32 if self.a_bmn.device.type == "mps" else torch.float64
        b_bjj = torch.diag_embed(torch.stack(self.diagonal_b, dim=1).to(wide))
        if self.size > 1:
            b_bjj += torch.diag_embed(torch.stack(self.above_b[1:-1], dim=1).to(wide), offset=1)
        peak_b = b_bjj.amax((-2, -1))
        b_bjj = b_bjj / torch.where(peak_b == 0, 1.0, peak_b)[:, None, None]
        m_bjj = _of_unit_trace(b_bjj.mT @ b_bjj)
        for _ in range(SQUARINGS):
            m_bjj = _of_unit_trace(m_bjj @ m_bjj)
        # m is now y y^T up to scale: its column with the largest diagonal entry is the best y.
        column_b = m_bjj.diagonal(dim1=-2, dim2=-1).argmax(-1)
        y_bj = torch.gather(m_bjj, 2, column_b[:, None, None].expand(-1, self.size, 1))[..., 0]
        y_bj = torch.where(
            (y_bj == 0).all(-1, keepdim=True), torch.eye(1, self.size, dtype=wide, device=y_bj.device), y_bj
        )
        y_bj, _ = _unit(y_bj)
        x_bj, value_b = _unit((b_bjj @ y_bj[..., None])[..., 0])
        inside_bj = (b_bjj.mT @ x_bj[..., None])[..., 0] - value_b[:, None] * y_bj
        outside_b = self.above_b[-1].to(wide) / torch.where(peak_b == 0, 1.0, peak_b) * x_bj[:, -1]
        residual_b = torch.hypot(torch.linalg.vector_norm(inside_bj, dim=-1), outside_b)
        residual_b = residual_b / torch.where(value_b == 0, 1.0, value_b)
        value_b = value_b * peak_b
        dtype = self.a_bmn.dtype
        vector_bn, _ = _unit(torch.bmm(y_bj[:, None].to(dtype), self.v_bjn[:, : self.size])[:, 0])
        return Sigma1(value_b.to(dtype), vector_bn, residual_b.to(dtype))


def _start(a_bmn: Tensor, start_bn: Tensor | None) -> Tensor:
    fixed_n = _fixed_direction(a_bmn.shape[2], a_bmn.device).to(a_bmn.dtype)
    fixed_bn, _ = _unit(fixed_n.expand(a_bmn.shape[0], -1))
    if start_bn is None:
        return fixed_bn
    start_bn = start_bn.to(a_bmn)
    start_bn = torch.where(start_bn.isfinite().all(-1, keepdim=True), start_bn, 0.0)
    mixed_bn, _ = _unit(_unit(start_bn)[0] + MIXED_IN * fixed_bn)
    return mixed_bn


def _fixed_direction(columns: int, device: torch.device) -> Tensor:
    """Numbers in [-0.5, 0.5) without pattern, the same on every device: a 31-bit integer hash of the index."""
    mask = 2**31 - 1
    hash_n = torch.arange(1, columns + 1, dtype=torch.int64, device=device)
    for multiplier in (0x45D9F3B, 0x119DE1F3):
        hash_n = (hash_n * multiplier) & mask
        hash_n = hash_n ^ (hash_n >> 15)
    return hash_n.float() / 2**31 - 0.5


def _unit(x_bn: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1 and their lengths; a zero row stays zero. Squares in float64: weights of 1e-25 have norms too."""
    wide = torch.float32 if x_bn.device.type == "mps" else torch.float64
    length_b = torch.linalg.vector_norm(x_bn, dim=-1, dtype=wide).to(x_bn.dtype)
    return x_bn / length_b.clamp(min=torch.finfo(x_bn.dtype).tiny)[:, None], length_b


def _of_unit_trace(m_bjj: Tensor) -> Tensor:
    trace_b = m_bjj.diagonal(dim1=-2, dim2=-1).sum(-1)
    return m_bjj / torch.where(trace_b == 0, 1.0, trace_b)[:, None, None]
