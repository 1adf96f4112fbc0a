"""Candidate signals that the recorder does not have, computed beside it to be judged in the ablation.

Shape suffixes: N heads of all sites of one shape, H query heads, G key heads, K head size, D width.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

_BLOCK = re.compile(r"(.*\.)?blocks\.\d+")


@dataclass(frozen=True)
class _Site:
    """An attention module's projections, (heads * K, D) each; query heads share key heads in order."""

    query: nn.Linear
    key: nn.Linear
    head_dim: int

    def heads_nkd(self) -> tuple[Tensor, Tensor]:
        """Float64 copies of the weights by query head."""
        query_hkd = self.query.weight.detach().double().unflatten(0, (-1, self.head_dim))
        key_gkd = self.key.weight.detach().double().unflatten(0, (-1, self.head_dim))
        return query_hkd.clone(), key_gkd.repeat_interleave(query_hkd.shape[0] // key_gkd.shape[0], dim=0)


def _site(module: nn.Module) -> _Site | None:
    query, key, head_dim = (getattr(module, name, None) for name in ("q_proj", "k_proj", "head_dim"))
    if isinstance(query, nn.Linear) and isinstance(key, nn.Linear) and isinstance(head_dim, int):
        return _Site(query, key, head_dim)
    return None


class Candidates:
    """Measures a model in training; changes neither it nor any random state.

    Args:
        model: attention modules have `q_proj`, `k_proj` and `head_dim`; blocks are named `blocks.<number>`.
        every: steps 0, every, 2 every, ... are measured.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self._every = every
        self._sites = [site for module in model.modules() if (site := _site(module)) is not None]
        self._blocks = [module for name, module in model.named_modules() if _BLOCK.fullmatch(name)]
        self._before: list[tuple[Tensor, Tensor]] = []
        self._handles: list[RemovableHandle] = []
        self._kurtoses: list[float] = []
        self._arm()

    def measure(self, step: int) -> dict[str, float]:
        """The signals of a step that was just made; call it at every step, right after `optimizer.step()`.

        Returns:
            Nothing at steps that are not measured, and no signal that could not be measured.
            `qk_update_rank` and `qk_update_rank_min`: mean and lowest over heads of `update_rank_n` since the
            measured step before. `kurtosis`: largest over blocks of the fourth standardised moment of all that the
            block put out in this step's forward, 3 for a normal distribution.
        """
        found: dict[str, float] = {}
        if step % self._every == 0:
            now = [site.heads_nkd() for site in self._sites]
            rank_n = _update_ranks(self._before, now)
            self._before = now
            if rank_n.numel():
                found |= {"qk_update_rank": rank_n.mean().item(), "qk_update_rank_min": rank_n.min().item()}
            if self._kurtoses:
                found["kurtosis"] = max(self._kurtoses)
        self._disarm()
        if (step + 1) % self._every == 0:
            self._arm()
        return found

    def _arm(self) -> None:
        self._handles = [block.register_forward_hook(self._see_block) for block in self._blocks]

    def _disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._kurtoses = [], []

    def _see_block(self, block: nn.Module, _: object, output: object) -> None:
        if block.training and isinstance(output, Tensor):
            value = kurtosis(output.detach())
            self._kurtoses += [] if value is None else [value]


def _update_ranks(before: list[tuple[Tensor, Tensor]], now: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`update_rank_n` of the heads of all sites, of those that have one."""
    alike: dict[tuple[int, ...], list[tuple[Tensor, ...]]] = {}
    # Nothing lies before the first measured step.
    for (query, key), (query_now, key_now) in zip(before, now[: len(before)], strict=True):
        shape = (*query.shape[1:], *key.shape[1:])
        alike.setdefault(shape, []).append((query, key, query_now - query, key_now - key))
    ranks = [update_rank_n(*map(torch.cat, zip(*sites, strict=True))) for sites in alike.values()]
    rank_n = torch.cat(ranks) if ranks else torch.empty(0)
    return rank_n[rank_n.isfinite()]


def update_rank_n(query_nkd: Tensor, key_nkd: Tensor, dquery_nkd: Tensor, dkey_nkd: Tensor) -> Tensor:
    """Effective rank of the first-order update dWq^T Wk + Wq^T dWk of each head's Wq^T Wk, over the most it can be.

    exp(-sum p ln p) with p = sigma^2 / sum sigma^2 (arXiv 2606.28116, Delta2, for tokens in columns), over
    min(2 K, D). The product [dWq^T, Wq^T] [Wk; dWk] has thin factors, so that its singular values are those of a
    core of 2 K by 2 K. QK-norm gains and rotations are not in it.

    Returns:
        (N,), in (0, 1]; NaN where there was no update or a weight is not finite.
    """
    left_ndr = torch.cat([dquery_nkd, query_nkd], dim=1).mT
    right_ndr = torch.cat([key_nkd, dkey_nkd], dim=1).mT
    # The solver refuses what is not finite.
    usable_n = left_ndr.isfinite().flatten(1).all(1) & right_ndr.isfinite().flatten(1).all(1)
    rank_n = torch.full_like(left_ndr[:, 0, 0], torch.nan)
    if usable_n.any():
        left, right = (torch.linalg.qr(factor[usable_n], mode="r").R for factor in (left_ndr, right_ndr))
        energy = torch.linalg.svdvals(left @ right.mT).square()
        share = energy / energy.sum(-1, keepdim=True)
        rank_n[usable_n] = torch.special.entr(share).sum(-1).exp() / share.shape[-1]
    return rank_n


def kurtosis(values: Tensor) -> float | None:
    """Fourth standardised moment of all entries; None where they are all the same or not all finite."""
    centred = values.double() - values.double().mean()
    variance = centred.square().mean()
    found = ((centred / variance.sqrt()) ** 4).mean()
    return found.item() if found.isfinite() else None
