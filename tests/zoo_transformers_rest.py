"""Cases: models of transformers that do something of their own with queries, keys or layers."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from zoo_case import BATCH, WIDTH, Case, Heads, array, case, cut, features, separate, site, tokens
from zoo_transformers import (
    BERT,
    BERT_RATES,
    GPT2,
    GPT2_RATES,
    LLAMA,
    H,
    K,
    Sites,
    built,
    each,
    hidden,
    text,
)

# CodeGen's rows come in 4 parts for 4 accelerators, each [q, v, k] of its own heads.
PARTS = 4


def _code_gen(m: Any, _: int) -> Heads:
    weight, stride = m.qkv_proj.weight, 3 * H * K // PARTS
    wq, wk = cut(weight, H, K, stride=stride), cut(weight, H, K, start=2 * K, stride=stride)
    return site(wq, wk, "rope")


def _tensor_heads(m: Any, _: int) -> Heads:
    """XLNet's projections are parameters (D, H, K)."""
    wq, wk = ([array(w[:, head].T) for head in range(H)] for w in (m.q, m.k))
    return site(wq, wk, "bias")


def _projected(flags: str = "") -> Any:
    return lambda m, _: separate(m.q_proj, m.k_proj, K, flags)


def _fused_mpt(m: Any, _: int) -> Heads:
    return site(cut(m.Wqkv.weight, H, K), cut(m.Wqkv.weight, H, K, start=WIDTH), "bias")


def _albert(model: Any) -> dict[str, Heads]:
    """One layer's weights serve all layers: one site, called twice."""
    path = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    m = model.get_submodule(path)
    return {path: separate(m.query, m.key, K)}


def _by_children(query: str, key: str, flags: str = "") -> Sites:
    def found(model: Any) -> dict[str, Heads]:
        return {
            name: separate(module.get_submodule(query), module.get_submodule(key), K, flags)
            for name, module in model.named_modules()
            if hasattr(module, query) and hasattr(module, key)
        }

    return found


def _reduced(model: Any) -> dict[str, Heads]:
    """The keys' own input is a shortened copy of the queries', which may be called cross attention."""
    found = _by_children("q_proj", "k_proj")(model)
    return {name: replace(heads, arguable=frozenset({"cross"})) for name, heads in found.items()}


def _forward_speech(model: Any) -> Tensor:
    return hidden(model, input_values=features(model, BATCH, 200))


def _forward_image(model: Any) -> Tensor:
    return hidden(model, pixel_values=features(model, BATCH, 3, 16, 16))


def _forward_xlnet(model: Any) -> Tensor:
    return hidden(model, input_ids=tokens(), use_mems=False)


SPEECH = {
    **BERT, "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [4, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
    "feat_extract_norm": "layer",
}  # fmt: skip
SEGFORMER = {
    "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, WIDTH],
    "num_attention_heads": [2, 4], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2],
}  # fmt: skip
JAMBA = {
    **LLAMA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2,
    "num_experts_per_tok": 1, "mamba_d_state": 8, "mamba_d_conv": 4, "mamba_expand": 2,
}  # fmt: skip
XLNET = {"d_model": WIDTH, "n_layer": 2, "n_head": H, "d_inner": 48}
DEBERTA = {
    **BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8, "share_att_key": True,
    "max_relative_positions": 16, "type_vocab_size": 0, "position_biased_input": False,
}  # fmt: skip

CASES: tuple[Case, ...] = (
    text("ALBERT, one layer called twice", "Albert", {**BERT, "embedding_size": 16}, _albert, rates=BERT_RATES),
    text(
        "DistilBERT", "DistilBert", {"dim": WIDTH, "n_layers": 2, "n_heads": H, "hidden_dim": 48},
        _by_children("q_lin", "k_lin"),
        rates="dropout attention_dropout",
    ),
    text(
        "DeBERTa-v2, disentangled", "DebertaV2", DEBERTA, _by_children("query_proj", "key_proj", "bias"), rates=BERT_RATES,
    ),
    text(
        "CodeGen", "CodeGen", {**GPT2, "rotary_dim": 4}, each("h.{}.attn", _code_gen), rates=GPT2_RATES,
    ),
    text(
        "GPT-Neo, not scaled, local", "GPTNeo",
        {"hidden_size": WIDTH, "num_layers": 2, "num_heads": H, "window_size": 4, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 32},
        each("h.{}.attn.attention", lambda m, i: separate(m.q_proj, m.k_proj, K, ("", "window")[i])),
        rates="embed_dropout resid_dropout attention_dropout",
    ),
    text(
        "MPT, ALiBi", "Mpt", {"d_model": WIDTH, "n_heads": H, "n_layers": 2, "max_seq_len": 32},
        each("blocks.{}.attn", _fused_mpt), rates="emb_pdrop resid_pdrop",
    ),
    text("Cohere, interleaved rotary", "Cohere", LLAMA, each("layers.{}.self_attn", _projected("rope"))),
    text(
        "StableLM, partial rotary", "StableLm", {**LLAMA, "partial_rotary_factor": 0.25},
        each("layers.{}.self_attn", _projected("rope")),
    ),
    text(
        "StarCoder2, biases and window", "Starcoder2", {**LLAMA, "sliding_window": 4},
        each("layers.{}.self_attn", _projected("rope window")),
    ),
    case(
        "XLNet, three-dimensional weights", "transformers", lambda p: built("XLNet", XLNET, p, "dropout"), _forward_xlnet,
        each("layer.{}.rel_attn", _tensor_heads),
    ),
    case(
        "wav2vec 2.0", "transformers",
        lambda p: built("Wav2Vec2", SPEECH, p, "hidden_dropout attention_dropout feat_proj_dropout activation_dropout"),
        _forward_speech, each("encoder.layers.{}.attention", _projected()),
    ),
    case(
        "SegFormer, reduced keys", "transformers",
        lambda p: built("Segformer", SEGFORMER, p, "hidden_dropout_prob attention_probs_dropout_prob drop_path_rate"),
        _forward_image, _reduced,
    ),
    text(
        "Jamba, hybrid", "Jamba", JAMBA,
        lambda m: {"layers.1.self_attn": separate(m.layers[1].self_attn.q_proj, m.layers[1].self_attn.k_proj, K)},
        skipped=("layers.0.mamba",), pad="",
    ),
)  # fmt: skip
