"""Cases: encoder-decoder, speech, vision and state-space models of transformers."""

from typing import Any

import torch
from torch import Tensor
from zoo_case import (
    BATCH,
    VOCABULARY,
    WIDTH,
    Case,
    Heads,
    case,
    features,
    padding,
    separate,
    tokens,
)
from zoo_transformers import BERT, LAYERS, H, K, Sites, built, each, hidden

SEQ2SEQ = {
    "d_model": WIDTH, "encoder_layers": LAYERS, "decoder_layers": LAYERS, "encoder_attention_heads": H,
    "decoder_attention_heads": H, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 1,
}  # fmt: skip
IMAGE = {"image_size": 16, "patch_size": 4}


def _t5(model: Any) -> dict[str, Heads]:
    found = {}
    for stack, flags in (("encoder", "bias"), ("decoder", "bias")):
        for index in range(LAYERS):
            path = f"{stack}.block.{index}.layer.0.SelfAttention"
            m = model.get_submodule(path)
            found[path] = separate(m.q, m.k, 6, flags)
    for index in range(LAYERS):
        path = f"decoder.block.{index}.layer.1.EncDecAttention"
        m = model.get_submodule(path)
        found[path] = separate(m.q, m.k, 6, "cross")
    return found


def _proj(m: Any, flags: str = "") -> Heads:
    return separate(m.q_proj, m.k_proj, K, flags)


def _seq2seq(model: Any) -> dict[str, Heads]:
    found = {}
    for index in range(LAYERS):
        for name, flags in (
            (f"encoder.layers.{index}.self_attn", ""),
            (f"decoder.layers.{index}.self_attn", ""),
            (f"decoder.layers.{index}.encoder_attn", "cross"),
        ):
            found[name] = _proj(model.get_submodule(name), flags)
    return found


def _forward_seq2seq(model: Any) -> Tensor:
    return hidden(
        model,
        input_ids=tokens(),
        attention_mask=padding(),
        decoder_input_ids=tokens(length=7),
        use_cache=False,
    )


def _forward_whisper(model: Any) -> Tensor:
    return hidden(
        model,
        input_features=features(model, BATCH, 8, 24),
        decoder_input_ids=tokens(length=7),
        use_cache=False,
    )


def _forward_clip(model: Any) -> Tensor:
    out = model(input_ids=tokens(), attention_mask=padding(), pixel_values=_pixels(model))
    return torch.cat(
        [
            out.text_model_output.last_hidden_state.flatten(),
            out.vision_model_output.last_hidden_state.flatten(),
        ]
    )


def _clip(model: Any) -> dict[str, Heads]:
    return {
        name: _proj(model.get_submodule(name))
        for tower in ("text_model", "vision_model")
        for index in range(LAYERS)
        for name in (f"{tower}.encoder.layers.{index}.self_attn",)
    }


def _pixels(model: Any, size: int = 16) -> Tensor:
    return features(model, BATCH, 3, size, size)


def _forward_image(model: Any) -> Tensor:
    return hidden(model, pixel_values=_pixels(model))


def _swin(flags: str, query: str, key: str) -> Sites:
    def found(model: Any) -> dict[str, Heads]:
        return {
            name: separate(module.get_submodule(query), module.get_submodule(key), K, flags)
            for name, module in model.named_modules()
            if hasattr(module, query) and hasattr(module, key)
        }

    return found


SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [2, 1], "num_heads": [2, 4], "window_size": 4,
}  # fmt: skip
SWIN_RATES = "hidden_dropout_prob attention_probs_dropout_prob drop_path_rate"
MAMBA2 = {
    "hidden_size": WIDTH, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8,
    "n_groups": 1, "chunk_size": 8,
}  # fmt: skip


def _vision(name: str, kind: str, config: dict[str, Any], sites: Sites, rates: str, **more: Any) -> Case:
    return case(name, "transformers", lambda p: built(kind, config, p, rates, **more), _forward_image, sites)


CASES: tuple[Case, ...] = (
    case(
        "T5", "transformers",
        lambda p: built("T5", {"d_model": WIDTH, "d_kv": 6, "d_ff": 48, "num_layers": LAYERS, "num_heads": H, "decoder_start_token_id": 0}, p, "dropout_rate"),
        _forward_seq2seq, _t5,
    ),
    case(
        "BART", "transformers", lambda p: built("Bart", SEQ2SEQ, p, "dropout attention_dropout"), _forward_seq2seq, _seq2seq,
    ),
    case(
        "Marian, eager", "transformers",
        lambda p: built("Marian", SEQ2SEQ, p, "dropout attention_dropout", eager=True), _forward_seq2seq, _seq2seq,
    ),
    case(
        "Whisper", "transformers",
        lambda p: built("Whisper", {**SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 12}, p, "dropout attention_dropout"),
        _forward_whisper, _seq2seq,
    ),
    _vision(
        "ViT", "ViT", {**BERT, **IMAGE}, each("layers.{}.attention", lambda m, _: _proj(m)),
        "hidden_dropout_prob attention_probs_dropout_prob",
    ),
    _vision(
        "DINOv2", "Dinov2", {**BERT, **IMAGE}, each("encoder.layer.{}.attention", lambda m, _: _proj(m)),
        "hidden_dropout_prob attention_probs_dropout_prob",
    ),
    case(
        "CLIP, two towers", "transformers",
        lambda p: built("CLIP", {"text_config": {**BERT, "vocab_size": VOCABULARY, "eos_token_id": 2, "attention_dropout": p}, "vision_config": {**BERT, **IMAGE, "attention_dropout": p}}, p),
        _forward_clip, _clip,
    ),
    _vision("Swin", "Swin", SWIN, _swin("bias", "q_proj", "k_proj"), SWIN_RATES),
    _vision("Swin V2, cosine", "Swinv2", SWIN, _swin("bias qk_norm", "query", "key"), SWIN_RATES),
    case(
        "Mamba 2, no attention", "transformers", lambda p: built("Mamba2", MAMBA2, p),
        lambda m: hidden(m, input_ids=tokens(), use_cache=False), lambda _: {}, skipped=("layers.0.mixer", "layers.1.mixer"),
    ),
)  # fmt: skip
