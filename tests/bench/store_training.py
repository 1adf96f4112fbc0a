"""A small GPT on noise, recorded: what the bench lets the recorder of this project write about."""

from pathlib import Path

import torch
from torch.nn import functional

from diagnostics import Recorder
from diagnostics.demo.gpt import GPT, GPTShape


class Training:
    """Four layers of four heads, one thread; a step takes some milliseconds."""

    def __init__(self, folder: Path, *, every: int) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        self._model = GPT(GPTShape(width=64, layers=4, heads=4, context=32))
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        self._tokens_bt = torch.randint(0, 256, (4, 33))
        self.recorder = Recorder(self._model, self._optimizer, folder, every=every)

    def step(self) -> float:
        """Trains one step and leaves it to the caller to close it; the loss."""
        logits_btv = self._model(self._tokens_bt[:, :-1])
        loss = functional.cross_entropy(logits_btv.flatten(0, 1), self._tokens_bt[:, 1:].flatten())
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())
