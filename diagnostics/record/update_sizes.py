"""How large captured updates are against the weights they changed.

Shape suffixes: N matrices of one shape, m x n.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diagnostics.measure.sigma1 import largest_singular_value
from diagnostics.record.update_watch import CapturedUpdate

TOLERANCE = 1e-2
"""Residual at which sigma1 is good enough for the record: its own error is of the order of the square, 1e-4."""
_STEPS_WITHOUT_TEST = 16


@dataclass(frozen=True)
class GroupUpdates:
    """Updates of the matrices of one shape; tensors are (N,)."""

    parameters: tuple[str, ...]
    sigma1_n: Tensor
    update_sigma1_n: Tensor
    frobenius_ratio_n: Tensor
    scale_n: Tensor


class UpdateSizes:
    """Measures captured updates; remembers each matrix's singular vectors, from which the next time starts."""

    def __init__(self) -> None:
        self._vectors: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def measure(self, captured: Sequence[CapturedUpdate]) -> list[GroupUpdates]:
        groups: dict[tuple[object, ...], list[CapturedUpdate]] = {}
        for one in captured:
            groups.setdefault((one.before_mn.shape, one.update_mn.dtype, one.before_mn.device), []).append(
                one
            )
        return [self._measure_group(group) for group in groups.values()]

    def _measure_group(self, group: Sequence[CapturedUpdate]) -> GroupUpdates:
        update_nmn = torch.stack([one.update_mn for one in group])
        before_nmn = torch.stack([one.before_mn for one in group]).to(update_nmn.dtype)
        starts = self._starts(group, update_nmn)
        weight = _sigma1(before_nmn, starts[0])
        update = _sigma1(update_nmn, starts[1])
        for position, one in enumerate(group):
            self._vectors[one.parameter] = (weight[1][position], update[1][position])
        return GroupUpdates(
            parameters=tuple(one.parameter for one in group),
            sigma1_n=weight[0],
            update_sigma1_n=update[0],
            frobenius_ratio_n=torch.linalg.matrix_norm(update_nmn) / torch.linalg.matrix_norm(before_nmn),
            scale_n=torch.stack([one.scale for one in group]),
        )

    def _starts(
        self, group: Sequence[CapturedUpdate], like_nmn: Tensor
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        known = [self._vectors.get(one.parameter) for one in group]
        # Vectors from a saved state may be of another model's matrices.
        fitting = [pair for pair in known if pair is not None and pair[0].shape == like_nmn.shape[2:]]
        if len(fitting) < len(group):
            return None, None
        weight_nn, update_nn = (
            torch.stack([pair[which].to(like_nmn) for pair in fitting]) for which in (0, 1)
        )
        return weight_nn, update_nn

    def state_dict(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: (a.clone(), b.clone()) for name, (a, b) in self._vectors.items()}

    def load_state_dict(self, state: dict[str, tuple[Tensor, Tensor]]) -> None:
        self._vectors = dict(state)


def _sigma1(matrices_nmn: Tensor, start_nn: Tensor | None) -> tuple[Tensor, Tensor]:
    """sigma1 and right singular vector of each matrix."""
    # The test of convergence makes the host wait for the device; a fixed number of steps does not.
    found = (
        largest_singular_value(matrices_nmn, start_nn, tolerance=TOLERANCE)
        if matrices_nmn.device.type == "cpu"
        else largest_singular_value(matrices_nmn, start_nn, steps=_STEPS_WITHOUT_TEST, tolerance=None)
    )
    return found.value_b, found.vector_bn
