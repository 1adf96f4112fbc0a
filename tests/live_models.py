"""A small model with dropout, a tied head, and both kinds of attention, for tests of the live half."""

import torch
from torch import Tensor, nn

from diagnostics.demo.gpt import CausalSelfAttention, GPTShape

# Small matrices are slower with more, and the machine is shared with other tests.
torch.set_num_threads(1)

WIDTH, VOCABULARY, CONTEXT = 16, 31, 6


class Small(nn.Module):
    """Tokens (B, T) to logits (B, T, V): one fused causal attention, one torch encoder layer, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(
            [
                CausalSelfAttention(GPTShape(width=WIDTH, heads=2)),
                nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.2, batch_first=True),
            ]
        )
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens_bt: Tensor) -> Tensor:
        x_btd = self.embed(tokens_bt)
        for layer in self.layers:
            x_btd = self.dropout(x_btd + layer(x_btd))
        logits_btv: Tensor = self.head(x_btd)
        return logits_btv


def batch(step: int) -> Tensor:
    """The tokens of a step, without touching the global random state."""
    return torch.randint(0, VOCABULARY, (3, CONTEXT), generator=torch.Generator().manual_seed(step))
