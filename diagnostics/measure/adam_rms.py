"""RMS_t of Adam's second moment: how far gradients have outgrown the average that their step is divided by."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLED = 65_536
"""Most entries of one tensor that are read; they are spread evenly over it."""
_TOGETHER = 2**24  # entries worked on at once: 64 MiB of float32 for gradients and as much for the moments
_LEAST = 1e-38  # of float32's smallest normal numbers: a zero over a zero then counts as zero


@dataclass(frozen=True)
class Moment:
    """One parameter's gradient beside what its optimizer holds of it after the step.

    Attributes:
        gradient: g_t, dense and real.
        second_moment: v_t, g_t taken in, not yet corrected for its start at zero; of the gradient's shape and device.
        step: t, counted from 1; a 0-d tensor of the same device where only the device knows it.
        beta2: decay of the second moment, 0 <= beta2 < 1.
        eps: what the optimizer adds to sqrt(v).
    """

    gradient: Tensor
    second_moment: Tensor
    step: float | Tensor
    beta2: float
    eps: float


@torch.no_grad()
def adam_rms(moments: Sequence[Moment]) -> Tensor | None:
    """The largest RMS_t = sqrt(mean(g_t^2 / max(v_t, eps^2))) of the tensors, v_t corrected for its start at zero.

    About 1 while v_t follows the gradients; above, v_t lags behind and the step is too long. Wortsman et al., "Stable
    and low-precision training for large-scale vision-language models", arXiv 2304.13013 (StableAdamW). Of a tensor
    with more than `SAMPLED` entries the mean is over an even spread of them. Nothing given is changed, and
    nothing waits for a device.

    Returns:
        0-d, float32 or wider, on the device of the first; NaN where a gradient is. None without tensors.
    """
    found: list[Tensor] = []
    for batch in _batches(moments):
        found += _rms(batch)
    if not found:
        return None
    return torch.stack([rms.to(found[0]) for rms in found]).max()


def _batches(moments: Sequence[Moment]) -> Iterator[list[Moment]]:
    """Those of one device whose steps are known in one way, few enough to hold copies of."""
    alike: dict[tuple[torch.device, bool], list[Moment]] = {}
    for moment in moments:
        if moment.gradient.numel():
            key = (moment.gradient.device, isinstance(moment.step, Tensor))
            alike.setdefault(key, []).append(moment)
    most = _TOGETHER // SAMPLED
    for group in alike.values():
        for start in range(0, len(group), most):
            yield group[start : start + most]


def _rms(batch: Sequence[Moment]) -> list[Tensor]:
    """RMS_t of each; the _foreach functions, torch's own optimizers' too, take one kernel for all tensors."""
    pairs = [_sampled(moment.gradient, moment.second_moment) for moment in batch]
    counts = [gradient.numel() for gradient, _ in pairs]
    # One copy each, in which all the rest works in place: |g| / max(sqrt(v), eps), whose squares need no range.
    gradients = _widened(torch.cat([gradient for gradient, _ in pairs])).split(counts)
    scales = _widened(torch.cat([second for _, second in pairs])).split(counts)
    torch._foreach_div_(scales, _corrections(batch))
    torch._foreach_sqrt_(scales)
    torch._foreach_clamp_min_(scales, [max(moment.eps, _LEAST) for moment in batch])
    ratios = torch._foreach_div(gradients, scales)  # noqa: SLF001 - as above
    norms = torch._foreach_norm(ratios)  # noqa: SLF001 - as above
    return list(torch._foreach_div(norms, [math.sqrt(count) for count in counts]))  # noqa: SLF001 - as above


def _corrections(batch: Sequence[Moment]) -> list[float] | list[Tensor]:
    """1 - beta2^t of each, without the cancellation that float32 would suffer at small t."""
    logs = [math.log(moment.beta2) if moment.beta2 > 0.0 else -math.inf for moment in batch]
    on_device = [moment.step.float() for moment in batch if isinstance(moment.step, Tensor)]
    if not on_device:
        return [-math.expm1(float(moment.step) * log) for moment, log in zip(batch, logs, strict=True)]
    powers = torch._foreach_expm1(torch._foreach_mul(on_device, logs))  # noqa: SLF001 - as above
    return list(torch._foreach_neg(powers))  # noqa: SLF001 - as above


def _sampled(gradient: Tensor, second_moment: Tensor) -> tuple[Tensor, Tensor]:
    """The same entries of both, at most `SAMPLED`, as flat views; copies only where the two lie differently."""
    if not gradient.is_contiguous():
        # In memory order a channels-last or transposed weight is flat again.
        order = sorted(range(gradient.ndim), key=gradient.stride, reverse=True)
        gradient, second_moment = gradient.permute(order), second_moment.permute(order)
    size = gradient.numel()
    stride = -(-size // SAMPLED)
    # A stride with a factor in common with a side of the tensor would read the same columns in every row.
    while math.gcd(stride, size) > 1:
        stride += 1
    return gradient.reshape(-1)[::stride], second_moment.reshape(-1)[::stride]


def _widened(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
