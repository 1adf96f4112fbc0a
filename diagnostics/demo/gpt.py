"""A small byte-level GPT, written as users write theirs; the recorder gets no help from it.

Shape suffixes: B batch, T context, D width, H heads, K head size, V vocabulary (256 bytes).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

VOCABULARY = 256


@dataclass(frozen=True)
class GPTShape:
    """Size of the model: `width` D, `layers`, `heads` H, `context` T."""

    width: int = 128
    layers: int = 4
    heads: int = 4
    context: int = 128


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention with one fused projection."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.n_head = shape.heads
        self.c_attn = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.c_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        batch, context, width = x_btd.shape
        q_btd, k_btd, v_btd = self.c_attn(x_btd).split(width, dim=2)
        q_bhtk, k_bhtk, v_bhtk = (
            part.view(batch, context, self.n_head, width // self.n_head).transpose(1, 2)
            for part in (q_btd, k_btd, v_btd)
        )
        y_bhtk = functional.scaled_dot_product_attention(q_bhtk, k_bhtk, v_bhtk, is_causal=True)
        y_btd = y_bhtk.transpose(1, 2).reshape(batch, context, width)
        out_btd: Tensor = self.c_proj(y_btd)
        return out_btd


class Block(nn.Module):
    """Pre-norm block: attention, then a GELU MLP."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(shape.width)
        self.attn = CausalSelfAttention(shape)
        self.ln_2 = nn.LayerNorm(shape.width)
        self.mlp = nn.Sequential(
            nn.Linear(shape.width, 4 * shape.width), nn.GELU(), nn.Linear(4 * shape.width, shape.width)
        )

    def forward(self, x_btd: Tensor) -> Tensor:
        x_btd = x_btd + self.attn(self.ln_1(x_btd))
        out_btd: Tensor = x_btd + self.mlp(self.ln_2(x_btd))
        return out_btd


class GPT(nn.Module):
    """Bytes in, logits over the next byte out; the output layer shares the embedding's weight."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, shape.width)
        self.wpe = nn.Embedding(shape.context, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        self.apply(self._normal_init)
        self.head.weight = self.wte.weight

    @staticmethod
    def _normal_init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        """Logits of shape (B, T, V) for tokens of shape (B, T)."""
        positions_t = torch.arange(tokens_bt.shape[1], device=tokens_bt.device)
        x_btd = self.wte(tokens_bt) + self.wpe(positions_t)
        for block in self.blocks:
            x_btd = block(x_btd)
        logits_btv: Tensor = self.head(self.ln_f(x_btd))
        return logits_btv
