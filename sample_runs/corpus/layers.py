"""The layers of the corpus's models: plain transformer blocks that differ where attention differs.

Shape suffixes: B batch, T tokens, S keys, D width, H query heads, G key heads, K head size.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Size of a model and what sets its family apart.

    Attributes:
        width: D.
        layers: number of blocks, of the encoder and of the decoder each where there are both.
        heads: H.
        key_heads: G, which divides H.
        context: T, the longest sequence.
        norm: `layer` or `rms`.
        post_norm: norms after the residual sum (Vaswani et al. 2017) instead of before each part.
        rope: rotary positions instead of learned ones.
        gated: SwiGLU instead of GELU.
        qk_norm: RMS norms with gains on the queries and keys of each head.
        window: side of the attention windows on a square grid of tokens, every other block shifted; 0: none.
        init: factor on the initial query and key weights.
    """

    width: int = 64
    layers: int = 4
    heads: int = 4
    key_heads: int = 4
    context: int = 64
    norm: str = "layer"
    post_norm: bool = False
    rope: bool = False
    gated: bool = False
    qk_norm: bool = False
    window: int = 0
    init: float = 1.0


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight
        return normed


def norm_of(shape: Shape) -> nn.Module:
    return RMSNorm(shape.width) if shape.norm == "rms" else nn.LayerNorm(shape.width)


class Attention(nn.Module):
    """Self or cross attention with grouped key heads."""

    def __init__(self, shape: Shape, *, causal: bool, shift: int = 0) -> None:
        super().__init__()
        self.shape, self.causal, self.shift = shape, causal, shift
        self.head_dim = shape.width // shape.heads
        keys = shape.key_heads * self.head_dim
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, keys, bias=False)
        self.v_proj = nn.Linear(shape.width, keys, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)
        if shape.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(self.head_dim), RMSNorm(self.head_dim)
        if shape.window:
            side = 2 * shape.window - 1
            self.relative_bias = nn.Parameter(torch.zeros(shape.heads, side * side))

    def forward(self, x_btd: Tensor, memory_bsd: Tensor | None = None) -> Tensor:
        source_bsd = x_btd if memory_bsd is None else memory_bsd
        q_bhtk = self._heads(self.q_proj(x_btd), self.shape.heads)
        k_bgsk = self._heads(self.k_proj(source_bsd), self.shape.key_heads)
        v_bgsk = self._heads(self.v_proj(source_bsd), self.shape.key_heads)
        if self.shape.qk_norm:
            q_bhtk, k_bgsk = self.q_norm(q_bhtk), self.k_norm(k_bgsk)
        if self.shape.rope and memory_bsd is None:
            q_bhtk, k_bgsk = _rotated(q_bhtk), _rotated(k_bgsk)
        out_bhtk = functional.scaled_dot_product_attention(
            q_bhtk,
            k_bgsk,
            v_bgsk,
            attn_mask=self._bias(x_btd.shape[1]) if self.shape.window else None,
            is_causal=self.causal and memory_bsd is None,
            enable_gqa=self.shape.key_heads != self.shape.heads,
        )
        out_btd: Tensor = self.o_proj(out_bhtk.transpose(1, 2).flatten(2))
        return out_btd

    def _heads(self, x_btd: Tensor, heads: int) -> Tensor:
        x_bthk: Tensor = x_btd.unflatten(-1, (heads, self.head_dim))
        return x_bthk.transpose(1, 2)

    def _bias(self, tokens: int) -> Tensor:
        """Relative position bias within windows, -inf between them: (H, T, T)."""
        side, window = math.isqrt(tokens), self.shape.window
        row_t = torch.arange(tokens) // side
        column_t = torch.arange(tokens) % side
        window_t = ((row_t + self.shift) // window) * side + (column_t + self.shift) // window
        apart_tt = window_t[:, None] != window_t[None, :]
        down_tt = (row_t[:, None] - row_t[None, :]).clamp(1 - window, window - 1) + window - 1
        right_tt = (column_t[:, None] - column_t[None, :]).clamp(1 - window, window - 1) + window - 1
        bias_htt = self.relative_bias[:, down_tt * (2 * window - 1) + right_tt]
        return bias_htt.masked_fill(apart_tt, -math.inf)


def _rotated(x_bhtk: Tensor) -> Tensor:
    half = x_bhtk.shape[-1] // 2
    rate_k = 10_000.0 ** (-torch.arange(half) / half)
    angle_tk = (torch.arange(x_bhtk.shape[-2])[:, None] * rate_k).to(x_bhtk.dtype)
    cos_tk, sin_tk = angle_tk.cos(), angle_tk.sin()
    a, b = x_bhtk[..., :half], x_bhtk[..., half:]
    return torch.cat([a * cos_tk - b * sin_tk, a * sin_tk + b * cos_tk], dim=-1)


class MLP(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = (8 * shape.width // 3) if shape.gated else 4 * shape.width
        self.up = nn.Linear(shape.width, hidden * (2 if shape.gated else 1))
        self.down = nn.Linear(hidden, shape.width)
        self.gated = shape.gated

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            gate, value = self.up(x).chunk(2, dim=-1)
            out: Tensor = self.down(functional.silu(gate) * value)
        else:
            out = self.down(functional.gelu(self.up(x)))
        return out


class Block(nn.Module):
    """Self attention, cross attention where there is a memory, MLP."""

    def __init__(self, shape: Shape, *, causal: bool, cross: bool = False, shift: int = 0) -> None:
        super().__init__()
        self.post_norm = shape.post_norm
        self.attn = Attention(shape, causal=causal, shift=shift)
        self.norm_1, self.norm_2 = norm_of(shape), norm_of(shape)
        self.mlp = MLP(shape)
        if cross:
            self.cross_attn, self.norm_c = Attention(replace(shape, window=0), causal=False), norm_of(shape)

    def forward(self, x_btd: Tensor, memory_bsd: Tensor | None = None) -> Tensor:
        if self.post_norm:
            x_btd = self.norm_1(x_btd + self.attn(x_btd))
            if memory_bsd is not None:
                x_btd = self.norm_c(x_btd + self.cross_attn(x_btd, memory_bsd))
            after_btd: Tensor = self.norm_2(x_btd + self.mlp(x_btd))
            return after_btd
        x_btd = x_btd + self.attn(self.norm_1(x_btd))
        if memory_bsd is not None:
            x_btd = x_btd + self.cross_attn(self.norm_c(x_btd), memory_bsd)
        out_btd: Tensor = x_btd + self.mlp(self.norm_2(x_btd))
        return out_btd


class Transformer(nn.Module):
    """Tokens or patches in, logits out: a language model, a classifier, or encoder and decoder.

    Args:
        shape: its size and family.
        inputs: vocabulary of the tokens, or features of a patch where `patches`.
        outputs: classes or vocabulary.
        causal: whether the (decoder's) self attention is causal.
        pooled: one prediction a sequence, from the mean over tokens, instead of one a token.
        patches: inputs are float features (B, T, features) instead of token numbers (B, T).
        encoder: an encoder beside it, whose tokens the decoder attends to.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        inputs: int,
        outputs: int,
        causal: bool = False,
        pooled: bool = False,
        patches: bool = False,
        encoder: bool = False,
    ) -> None:
        super().__init__()
        self.shape, self.pooled = shape, pooled
        self.embed = nn.Linear(inputs, shape.width) if patches else nn.Embedding(inputs, shape.width)
        self.encoder: nn.ModuleList | None = None
        if encoder:
            self.encoder = nn.ModuleList(Block(shape, causal=False) for _ in range(shape.layers))
            self.source_norm = norm_of(shape)
        self.positions = None if shape.rope else nn.Parameter(0.02 * torch.randn(shape.context, shape.width))
        self.blocks = nn.ModuleList(
            Block(shape, causal=causal, cross=encoder, shift=(number % 2) * (shape.window // 2))
            for number in range(shape.layers)
        )
        self.norm = norm_of(shape)
        self.head = nn.Linear(shape.width, outputs)
        self.apply(self._init)

    def forward(self, x_bt: Tensor, source_bs: Tensor | None = None) -> Tensor:
        memory_bsd: Tensor | None = None
        if self.encoder is not None and source_bs is not None:
            memory_bsd = self._embedded(source_bs)
            for block in self.encoder:
                memory_bsd = block(memory_bsd)
            memory_bsd = self.source_norm(memory_bsd)
        x_btd = self._embedded(x_bt)
        for block in self.blocks:
            x_btd = block(x_btd, memory_bsd)
        x_btd = self.norm(x_btd)
        logits: Tensor = self.head(x_btd.mean(1) if self.pooled else x_btd)
        return logits

    def _embedded(self, x_bt: Tensor) -> Tensor:
        x_btd: Tensor = self.embed(x_bt)
        return x_btd if self.positions is None else x_btd + self.positions[: x_btd.shape[1]]

    def _init(self, module: nn.Module) -> None:
        # Half of the usual 1 / sqrt(fan in): a depth of a dozen blocks trains without further scaling.
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.weight.shape[1]))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Attention):
            with torch.no_grad():
                module.q_proj.weight *= self.shape.init
                module.k_proj.weight *= self.shape.init
