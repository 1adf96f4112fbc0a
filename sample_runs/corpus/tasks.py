"""The corpus's tasks: real text, real images, and synthetic sequences where the task is the point.

A task gives batches of inputs, sources (of the encoder, or None) and targets; which batches depends on the seed
alone. `chance` is the loss of the best constant prediction: the entropy of the targets, in nats.
"""

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from diagnostics.demo.text import standard_library_text

Batch = tuple[Tensor, Tensor | None, Tensor]
IGNORED = -100
"""Target of what is not to be predicted, as torch's cross entropy has it."""


class Task(Protocol):
    inputs: int
    outputs: int
    chance: float

    def next(self) -> Batch: ...


@dataclass(frozen=True)
class Noise:
    """Targets replaced by ones drawn evenly from `classes`, a share of them."""

    share: float
    classes: int
    generator: torch.Generator

    def spoil(self, targets: Tensor) -> Tensor:
        wrong = (torch.rand(targets.shape, generator=self.generator) < self.share) & (targets != IGNORED)
        drawn = torch.randint(0, self.classes, targets.shape, generator=self.generator)
        return torch.where(wrong, drawn, targets)

    def chance(self, shares: Tensor) -> float:
        """Entropy in nats of targets that had these shares before the noise."""
        mixed = (1.0 - self.share) * shares + self.share / self.classes
        return float(-(mixed * mixed.clamp_min(1e-12).log()).sum())


@cache
def _text_bytes() -> Tensor:
    raw = np.frombuffer(standard_library_text(1_000_000), dtype=np.uint8)
    return torch.from_numpy(raw[raw < Text.HIDDEN].astype(np.int64))


class Text:
    """Next byte of the standard library's source; with `masked`, the hidden bytes of a window instead."""

    HIDDEN = 127
    inputs = outputs = 128

    def __init__(
        self, seed: int, *, batch: int, context: int, noise: float = 0.0, masked: float = 0.0
    ) -> None:
        self._bytes_n = _text_bytes()
        self._batch, self._context, self._masked = batch, context, masked
        self._generator = torch.Generator().manual_seed(seed)
        self._noise = Noise(noise, self.HIDDEN, torch.Generator().manual_seed(seed + 1))
        shares = torch.bincount(self._bytes_n, minlength=self.HIDDEN) / len(self._bytes_n)
        self.chance = self._noise.chance(shares)

    def next(self) -> Batch:
        last = len(self._bytes_n) - self._context - 1
        starts_b = torch.randint(0, last, (self._batch, 1), generator=self._generator)
        window_bt = self._bytes_n[starts_b + torch.arange(self._context + 1)]
        input_bt, target_bt = window_bt[:, :-1], window_bt[:, 1:]
        if self._masked:
            hidden_bt = torch.rand(input_bt.shape, generator=self._generator) < self._masked
            target_bt = input_bt.masked_fill(~hidden_bt, IGNORED)
            input_bt = input_bt.masked_fill(hidden_bt, self.HIDDEN)
        return input_bt, None, self._noise.spoil(target_bt)


class Digits:
    """scikit-learn's 8 x 8 digits as patches of `side` x `side` pixels, after enlarging by `zoom`."""

    CLASSES = outputs = 10

    def __init__(self, seed: int, *, batch: int, side: int, zoom: int = 1, noise: float = 0.0) -> None:
        digits = load_digits()
        images_nxx = torch.from_numpy(digits.images).float() / 16.0
        images_nxx = images_nxx.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
        count, size, _ = images_nxx.shape
        grid = size // side
        self._patches_ntf = (
            images_nxx.view(count, grid, side, grid, side)
            .transpose(2, 3)
            .reshape(count, grid * grid, side * side)
        )
        self._labels_n = torch.from_numpy(digits.target).long()
        self._batch = batch
        self._generator = torch.Generator().manual_seed(seed)
        self._noise = Noise(noise, self.CLASSES, torch.Generator().manual_seed(seed + 1))
        self.inputs = side * side
        self.chance = self._noise.chance(torch.bincount(self._labels_n) / count)

    def next(self) -> Batch:
        index_b = torch.randint(0, len(self._labels_n), (self._batch,), generator=self._generator)
        patches_btf = self._patches_ntf[index_b]
        # A little noise on the pixels, so that no image comes twice.
        patches_btf = patches_btf + 0.1 * torch.randn(patches_btf.shape, generator=self._generator)
        return patches_btf, None, self._noise.spoil(self._labels_n[index_b])


class Sequences:
    """Random symbols to be written in an order that asks for sharp attention: `reverse`, `sort` or `recall`.

    `recall` shows each sequence twice in a row, and asks for the second showing only.
    """

    def __init__(
        self, seed: int, *, batch: int, length: int, symbols: int, order: str, noise: float = 0.0
    ) -> None:
        if order not in ("reverse", "sort", "recall"):
            raise ValueError(f"order {order!r} is none of reverse, sort and recall")
        self._batch, self._length, self._symbols, self._order = batch, length, symbols, order
        self.inputs = self.outputs = symbols + 1
        self._generator = torch.Generator().manual_seed(seed)
        self._noise = Noise(noise, symbols, torch.Generator().manual_seed(seed + 1))
        self.chance = self._noise.chance(torch.full((symbols,), 1.0 / symbols))

    def next(self) -> Batch:
        source_bs = torch.randint(0, self._symbols, (self._batch, self._length), generator=self._generator)
        if self._order == "recall":
            whole_bt = torch.cat([source_bs, source_bs], dim=1)
            target_bt = whole_bt[:, 1:].clone()
            target_bt[:, : self._length - 1] = IGNORED
            return whole_bt[:, :-1], None, self._noise.spoil(target_bt)
        target_bs = source_bs.flip(1) if self._order == "reverse" else source_bs.sort(1).values
        begin_b1 = torch.full((self._batch, 1), self._symbols)
        return torch.cat([begin_b1, target_bs[:, :-1]], dim=1), source_bs, self._noise.spoil(target_bs)
