"""Cases: torch's own attention layers."""

from typing import Any

import torch
from torch import Tensor, nn
from zoo_case import (
    BATCH,
    LENGTH,
    VOCABULARY,
    WIDTH,
    Case,
    Heads,
    case,
    cut,
    features,
    fused,
    padding,
    site,
    tokens,
)

HEADS = 4


class _Attention(nn.Module):
    """Tokens through one nn.MultiheadAttention, self or cross."""

    def __init__(self, dropout: float, *, need_weights: bool = False, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=dropout, batch_first=True, **options)
        self.need_weights = need_weights

    def forward(self, tokens_bt: Tensor, context: tuple[Tensor, Tensor] | None = None) -> Tensor:
        x_btd = self.embed(tokens_bt)
        key, value = context or (x_btd, x_btd)
        causal = None if context else torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        attended_btd, _ = self.attention(
            x_btd, key, value, attn_mask=causal, need_weights=self.need_weights,
            key_padding_mask=padding() == 0 if context is None else None,
        )  # fmt: skip
        y_btd: Tensor = x_btd + attended_btd
        return y_btd


def _multi_head(module: nn.MultiheadAttention, flags: str = "") -> Heads:
    return fused(module.in_proj_weight, HEADS, flags)


def _separate_dims(model: _Attention) -> dict[str, Heads]:
    module, size = model.attention, WIDTH // HEADS
    wq, wk = cut(module.q_proj_weight, HEADS, size), cut(module.k_proj_weight, HEADS, size)
    return {"attention": site(wq, wk, "cross")}


def _forward_other_dims(model: _Attention) -> Tensor:
    context = features(model, BATCH, 9, 24), features(model, BATCH, 9, 20)
    return _run(model, tokens(), context)


def _run(model: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    output: Tensor = model(*inputs, **named)
    return output


class _Encoder(nn.Module):
    def __init__(self, dropout: float, *, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 64, dropout, batch_first=True, norm_first=norm_first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        return _run(self.body, self.embed(tokens_bt), src_key_padding_mask=padding() == 0)


class _Decoder(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 64, dropout, batch_first=True, norm_first=True)
        self.body = nn.TransformerDecoder(layer, 2)

    def forward(self, tokens_bt: Tensor, memory_bsd: Tensor) -> Tensor:
        hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
        return _run(
            self.body,
            self.embed(tokens_bt),
            memory_bsd,
            tgt_mask=hidden,
            memory_key_padding_mask=padding(length=9) == 0,
        )


def _layers(model: Any, body: str, *, cross: bool) -> dict[str, Heads]:
    found = {}
    for index, layer in enumerate(model.get_submodule(body).layers):
        found[f"{body}.layers.{index}.self_attn"] = _multi_head(layer.self_attn)
        if cross:
            found[f"{body}.layers.{index}.multihead_attn"] = _multi_head(layer.multihead_attn, "cross")
    return found


def _transformer(dropout: float) -> nn.Module:
    return nn.Transformer(WIDTH, HEADS, 2, 2, 64, dropout, batch_first=True)


def _forward_transformer(model: nn.Transformer) -> Tensor:
    hidden = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float32)
    source, target = features(model, BATCH, LENGTH, WIDTH), features(model, BATCH, 7, WIDTH)
    return _run(model, source, target, tgt_mask=hidden.to(source.dtype))


CASES: tuple[Case, ...] = (
    case(
        "MultiheadAttention", "torch", _Attention, lambda m: _run(m, tokens()),
        lambda m: {"attention": _multi_head(m.attention)},
    ),
    case(
        "MultiheadAttention, need_weights", "torch", lambda p: _Attention(p, need_weights=True),
        lambda m: _run(m, tokens()), lambda m: {"attention": _multi_head(m.attention)},
    ),
    case(
        "MultiheadAttention, kdim and vdim", "torch", lambda p: _Attention(p, kdim=24, vdim=20),
        _forward_other_dims, _separate_dims,
    ),
    case(
        "MultiheadAttention, bias_kv and zero_attn", "torch",
        lambda p: _Attention(p, add_bias_kv=True, add_zero_attn=True), lambda m: _run(m, tokens()),
        lambda m: {"attention": _multi_head(m.attention)},
    ),
    case(
        "TransformerEncoder", "torch", lambda p: _Encoder(p, norm_first=False), lambda m: _run(m, tokens()),
        lambda m: _layers(m, "body", cross=False),
    ),
    case(
        "TransformerEncoder, norm_first", "torch", lambda p: _Encoder(p, norm_first=True),
        lambda m: _run(m, tokens()), lambda m: _layers(m, "body", cross=False),
    ),
    case(
        "TransformerDecoder", "torch", _Decoder,
        lambda m: _run(m, tokens(), features(m, BATCH, 9, WIDTH)), lambda m: _layers(m, "body", cross=True),
    ),
    case(
        "Transformer", "torch", _transformer, _forward_transformer,
        lambda m: _layers(m, "encoder", cross=False) | _layers(m, "decoder", cross=True),
    ),
)  # fmt: skip
