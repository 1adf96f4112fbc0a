"""Real text that every machine with Python has: the source of its standard library, as bytes."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

TEXT_BYTES = 2_000_000
LEAST_BYTES = 100_000


def standard_library_text(limit: int = TEXT_BYTES) -> bytes:
    """The standard library's top-level modules, joined in name order and cut at `limit` bytes.

    Name order makes the text the same on every machine with the same Python version.

    Raises:
        FileNotFoundError: this Python keeps its library without sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts: list[bytes] = []
    size = 0
    for path in sorted(folder.glob("*.py")):
        parts.append(path.read_bytes())
        size += len(parts[-1])
        if size >= limit:
            break
    if size < LEAST_BYTES:
        raise FileNotFoundError(
            f"{folder} holds {size} bytes of Python source, the demo needs at least {LEAST_BYTES}; "
            "run it with a Python that keeps its standard library as .py files"
        )
    return b"".join(parts)[:limit]


class ByteBatches:
    """Batches of consecutive bytes; batch i depends on the seed and i alone, so arms see the same data.

    Args:
        text: the bytes to draw from.
        batch_size: B, sequences a batch.
        context: T, bytes a sequence.
        seed: of the generator that draws the offsets; torch's global generator is left alone.
    """

    def __init__(self, text: bytes, *, batch_size: int, context: int, seed: int) -> None:
        self._tokens_n = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self._batch_size = batch_size
        self._context = context
        self._generator = torch.Generator().manual_seed(seed)

    def next(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, both int64 of shape (B, T); targets are the inputs moved on by one."""
        last = self._tokens_n.numel() - self._context - 1
        starts_b = torch.randint(0, last, (self._batch_size, 1), generator=self._generator)
        window_bt = self._tokens_n[starts_b + torch.arange(self._context + 1)]
        return window_bt[:, :-1], window_bt[:, 1:]
