"""Cases: attention that users write themselves.

Shape suffixes: B sequences, T query rows, S keys, H query heads, K head size, D model width.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import flex_attention as flex
from zoo_case import (
    LENGTH,
    VOCABULARY,
    WIDTH,
    Array,
    Case,
    Heads,
    array,
    case,
    cut,
    fused,
    quiet_library,
    site,
    tokens,
)

H, G, K = 4, 2, 8


class _Net(nn.Module):
    """Tokens through two residual blocks of some attention."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.wte = nn.Embedding(VOCABULARY, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.blocks = nn.ModuleList(attention() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        x_btd = self.wte(tokens_bt)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x_btd = x_btd + block(norm(x_btd))
        logits: Tensor = self.head(x_btd)
        return logits


def _heads(x_btd: Tensor, heads: int = H) -> Tensor:
    batch, length, width = x_btd.shape
    return x_btd.view(batch, length, heads, width // heads).transpose(1, 2)


def _hidden(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


class _NanoGPT(nn.Module):
    """GPT-2's names on ordinary Linears."""

    def __init__(self, dropout: float, *, flash: bool) -> None:
        super().__init__()
        self.n_head, self.flash, self.dropout = H, flash, dropout
        self.c_attn = nn.Linear(WIDTH, 3 * WIDTH)
        self.c_proj = nn.Linear(WIDTH, WIDTH)
        self.attn_dropout = nn.Dropout(dropout)
        self.register_buffer("bias", _hidden(LENGTH).logical_not()[None, None])

    def forward(self, x_btd: Tensor) -> Tensor:
        q_bhtk, k_bhsk, v_bhsk = (_heads(part) for part in self.c_attn(x_btd).split(WIDTH, dim=2))
        if self.flash:
            rate = self.dropout if self.training else 0.0
            y_bhtk = functional.scaled_dot_product_attention(
                q_bhtk, k_bhsk, v_bhsk, dropout_p=rate, is_causal=True
            )
        else:
            att = (q_bhtk @ k_bhsk.transpose(-2, -1)) * (1.0 / math.sqrt(K))
            att = att.masked_fill(self.get_buffer("bias") == 0, float("-inf"))
            y_bhtk = self.attn_dropout(functional.softmax(att, dim=-1)) @ v_bhsk
        y_btd: Tensor = self.c_proj(y_bhtk.transpose(1, 2).flatten(2))
        return y_btd


class _OddlyNamed(nn.Module):
    """No name that a rule could know; heads are the inner index of the rows, and grouped."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Linear(WIDTH, H * K, bias=False), nn.Linear(WIDTH, G * K)
        self.gamma, self.delta = nn.Linear(WIDTH, G * K), nn.Linear(H * K, WIDTH)
        self.noise = nn.Dropout(dropout)

    def forward(self, x_btd: Tensor) -> Tensor:
        q_bthk = self.alpha(x_btd).unflatten(-1, (K, H)).transpose(-1, -2)
        k_bsgk, v_bsgk = (
            f(x_btd).unflatten(-1, (G, K)).repeat_interleave(H // G, dim=2) for f in (self.beta, self.gamma)
        )
        who = torch.einsum("bthk,bshk->bhts", q_bthk, k_bsgk) / K**0.5
        who = who + torch.zeros_like(who).masked_fill(_hidden(x_btd.shape[1]), -math.inf)
        mixed = torch.einsum("bhts,bshk->bthk", self.noise(who.softmax(-1)), v_bsgk)
        y_btd: Tensor = self.delta(mixed.flatten(2))
        return y_btd


def _odd(m: _OddlyNamed) -> Heads:
    weight = array(m.alpha.weight)
    return site([weight[head::H] for head in range(H)], cut(m.beta.weight, G, K))


class _Tensors(nn.Module):
    """Projections that are parameters of three dimensions, contracted by einsum; softmax by hand over (B, T, H, S)."""

    def __init__(self) -> None:
        super().__init__()
        self.to_queries, self.to_keys, self.to_values = (
            nn.Parameter(torch.empty(H, WIDTH, K)) for _ in range(3)
        )
        self.back = nn.Parameter(torch.empty(H, K, WIDTH))

    def forward(self, x_btd: Tensor) -> Tensor:
        q, k, v = (
            torch.einsum("btd,hdk->bthk", x_btd, w) for w in (self.to_queries, self.to_keys, self.to_values)
        )
        scores_bths = torch.einsum("bthk,bshk->bths", q, k) * K**-0.5
        weights_bths = torch.softmax(scores_bths, dim=-1)
        return torch.einsum("bths,bshk,hkd->btd", weights_bths, v, self.back)


def _tensors(m: _Tensors) -> Heads:
    wq, wk = ([array(w[head].T) for head in range(H)] for w in (m.to_queries, m.to_keys))
    return site(wq, wk)


class _Matmul(nn.Module):
    """One head, projections as `x @ W`, multiplied by bmm in three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.empty(WIDTH, size)) for size in (K, K, WIDTH))

    def forward(self, x_btd: Tensor) -> Tensor:
        scores_bts = torch.bmm(x_btd @ self.a, (x_btd @ self.b).mT) / math.sqrt(K)
        return torch.bmm(scores_bts.softmax(-1), x_btd @ self.c)


def _matmul(m: _Matmul) -> Heads:
    return site([array(m.a.T)], [array(m.b.T)])


def _slope(head: Tensor) -> Tensor:
    return 0.5 ** (head + 1)


class _Flex(nn.Module):
    """FlexAttention, causal and with ALiBi's score. On a CPU it has no backward, so its projections are frozen."""

    def __init__(self, *, biased: bool) -> None:
        super().__init__()
        self.num_heads, self.biased = H, biased
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, size * K) for size in (H, G, G))
        self.o_proj = nn.Linear(H * K, WIDTH)
        for layer in (self.q_proj, self.k_proj, self.v_proj):
            layer.requires_grad_(requires_grad=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        x_btd = x_btd.detach()
        length = x_btd.shape[1]
        q, k, v = _heads(self.q_proj(x_btd)), _heads(self.k_proj(x_btd), G), _heads(self.v_proj(x_btd), G)
        mask = flex.create_block_mask(_causal, None, None, length, length, device=str(x_btd.device))
        score = _alibi if self.biased else None
        with (
            quiet_library()
        ):  # "without torch.compile() this uses an unfused implementation": a CPU has no other
            y_bhtk: Any = flex.flex_attention(q, k, v, score_mod=score, block_mask=mask, enable_gqa=True)
        y_btd: Tensor = self.o_proj(y_bhtk.transpose(1, 2).flatten(2))
        return y_btd


def _causal(_b: Tensor, _h: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return key <= row


def _alibi(score: Tensor, _b: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
    return score + _slope(head) * (key - row)


def _flex(m: _Flex) -> Heads:
    return site(cut(m.q_proj.weight, H, K), cut(m.k_proj.weight, G, K), "bias" if m.biased else "")


def _flex_logits(model: _Net) -> dict[str, Array]:
    """By hand from the layers' own inputs, all in the model's dtype."""
    found: dict[str, Array] = {}
    with torch.no_grad():
        x_btd = model.wte(tokens())
        for index, (norm, block) in enumerate(zip(model.norms, model.blocks, strict=True)):
            inner: Any = block
            normed_btd = norm(x_btd)
            q, k = array(_heads(inner.q_proj(normed_btd))), array(_heads(inner.k_proj(normed_btd), G))
            logits = q @ np.repeat(k, H // G, axis=1).swapaxes(-1, -2) / math.sqrt(K)
            rows, keys = np.arange(LENGTH)[:, None], np.arange(LENGTH)
            if inner.biased:
                logits = logits + 0.5 ** np.arange(1, H + 1)[:, None, None] * (keys - rows)
            found[f"blocks.{index}"] = np.where(keys <= rows, logits, -np.inf)
            x_btd = x_btd + block(normed_btd)
    return found


def _blocks(of: Callable[[Any], Heads]) -> Callable[[Any], dict[str, Heads]]:
    return lambda model: {f"blocks.{index}": of(block) for index, block in enumerate(model.blocks)}


def _own(name: str, attention: Callable[[float], nn.Module], of: Callable[[Any], Heads], **more: Any) -> Case:
    return case(
        name, "own code", lambda p: _Net(lambda: attention(p)), lambda m: m(tokens()), _blocks(of), **more
    )


CASES: tuple[Case, ...] = (
    _own("nanoGPT, flash", lambda p: _NanoGPT(p, flash=True), lambda m: fused(m.c_attn.weight, H)),
    _own("nanoGPT, manual", lambda p: _NanoGPT(p, flash=False), lambda m: fused(m.c_attn.weight, H)),
    _own("odd names, heads interleaved, einsum", _OddlyNamed, _odd),
    _own("three-dimensional weights, einsum", lambda _: _Tensors(), _tensors),
    _own("one head, matmul", lambda _: _Matmul(), _matmul),
    _own("FlexAttention, causal", lambda _: _Flex(biased=False), _flex, logits=_flex_logits),
    _own("FlexAttention, ALiBi score", lambda _: _Flex(biased=True), _flex, logits=_flex_logits),
)
