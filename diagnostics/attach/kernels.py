"""The way in for kernels that compute attention out of sight: they hand in what they know of their own rows.

    from diagnostics.attach.kernels import hand_in

    out, lse, row_max = my_flash_attention(q, k, v)
    hand_in(max_logit_bht=row_max)

Outside a measured forward of an attached model this returns at once.

Shape suffixes: B sequences, H query heads, T query rows.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.errors import DiagnosticsError
from diagnostics.measure.attention import RowStatistics


@dataclass(frozen=True)
class KernelRows:
    """What a kernel knows of its rows: each (B, H, T) or None; NaN in rows that do not count (padding)."""

    entropy_bht: Tensor | None
    max_logit_bht: Tensor | None

    def statistics(self) -> RowStatistics:
        """The same as measured rows give; what the kernel does not know is NaN, and so null in the tables."""
        given = self.entropy_bht if self.entropy_bht is not None else self.max_logit_bht
        assert given is not None
        unknown_h = torch.full((given.shape[1],), torch.nan, device=given.device)
        entropy = self.entropy_bht.float() if self.entropy_bht is not None else None
        largest = self.max_logit_bht.float() if self.max_logit_bht is not None else None
        return RowStatistics(
            entropy_h=unknown_h if entropy is None else entropy.nanmean((0, 2)),
            entropy_min_h=unknown_h if entropy is None else _extreme(entropy, -1.0),
            entropy_frac_h=unknown_h,
            entropy_bound_h=unknown_h,
            max_logit_h=unknown_h if largest is None else _extreme(largest, 1.0),
            rank_frac_h=unknown_h,
            rows_h=(~given.isnan()).sum((0, 2), dtype=torch.int32),
        )


Listener = Callable[[Callable[[], KernelRows]], None]
_listening = threading.local()


def hand_in(
    *,
    entropy_bht: Tensor | None = None,
    max_logit_bht: Tensor | None = None,
    lse_bht: Tensor | None = None,
    mean_logit_bht: Tensor | None = None,
) -> None:
    """Called by an attention kernel right after it ran, inside its module's forward.

    It never raises: numbers that cannot be used take the module's site out, with a warning that says why.

    Args:
        entropy_bht: entropy of each row's attention, nats; or instead
        lse_bht: log-sum-exp of each row's logits, together with
        mean_logit_bht: their mean under the row's own attention: entropy = lse - mean.
        max_logit_bht: largest logit of each row.
    """
    for listener in getattr(_listening, "listeners", []):
        listener(lambda: _checked(entropy_bht, max_logit_bht, lse_bht, mean_logit_bht))


def _checked(
    entropy_bht: Tensor | None,
    max_logit_bht: Tensor | None,
    lse_bht: Tensor | None,
    mean_logit_bht: Tensor | None,
) -> KernelRows:
    if (lse_bht is None) != (mean_logit_bht is None):
        raise DiagnosticsError("hand_in: lse_bht and mean_logit_bht go together: entropy is their difference")
    if entropy_bht is None and lse_bht is not None and mean_logit_bht is not None:
        entropy_bht = (lse_bht.detach().float() - mean_logit_bht.detach().float()).clamp_min(0.0)
    given = [tensor for tensor in (entropy_bht, max_logit_bht) if tensor is not None]
    if not given:
        raise DiagnosticsError(
            "hand_in was given nothing; give entropy_bht, max_logit_bht, or lse_bht with mean_logit_bht"
        )
    if any(tensor.ndim != 3 or tensor.shape != given[0].shape for tensor in given):  # noqa: PLR2004 - (B, H, T)
        raise DiagnosticsError(
            f"hand_in: the tensors have shapes {[tuple(tensor.shape) for tensor in given]}; each must be (batch, heads, rows)"
        )
    return KernelRows(*(None if t is None else t.detach() for t in (entropy_bht, max_logit_bht)))


def listen(listener: Listener) -> None:
    """From now on `listener` receives what kernels of this thread hand in."""
    _listening.listeners = [*getattr(_listening, "listeners", []), listener]


def unlisten(listener: Listener) -> None:
    _listening.listeners = [each for each in getattr(_listening, "listeners", []) if each != listener]


def _extreme(values_bht: Tensor, sign: float) -> Tensor:
    """Largest (sign 1) or lowest (-1) value of each head, NaN where it has none."""
    known_bht = (sign * values_bht).masked_fill(values_bht.isnan(), -torch.inf)
    best_h: Tensor = known_bht.amax((0, 2))
    return (sign * best_h).masked_fill(values_bht.isnan().all(0).all(-1), torch.nan)
