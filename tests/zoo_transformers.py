"""Cases: decoder-only and encoder-only text models of transformers.

The rows of every projection are written down here from each model's own forward.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zoo_case import (
    VOCABULARY,
    WIDTH,
    Array,
    Case,
    Heads,
    array,
    case,
    cut,
    fused,
    imported,
    padding,
    separate,
    site,
    tokens,
)

LAYERS = 2
H, G, K = 4, 2, 8
Sites = Callable[[Any], dict[str, Heads]]


def built(
    kind: str,
    config: dict[str, Any],
    dropout: float,
    rates: str = "",
    *,
    part: str = "Model",
    eager: bool = False,
) -> nn.Module:
    """A tiny random model.

    Args:
        kind: name of the architecture: `{kind}Config` and `{kind}{part}` are its classes.
        config: what differs from the defaults; the vocabulary is set for all.
        dropout: written to each of the config's fields named in `rates`.
        rates: names of dropout rates, by spaces; without any, the architecture knows none.
        part: which of the architecture's models.
        eager: whether attention is written out instead of called.
    """
    transformers = imported("transformers")
    fields = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **config}
    fields |= dict.fromkeys(rates.split(), dropout)
    settings = getattr(transformers, f"{kind}Config")(**fields)
    settings._experts_implementation = "eager"  # the grouped product of experts knows no float64
    if eager:
        settings._attn_implementation = "eager"
    model: nn.Module = getattr(transformers, f"{kind}{part}")(settings)
    return model


def hidden(model: Any, **named: Any) -> Tensor:
    output: Tensor = model(**named).last_hidden_state
    return output


def text(
    name: str,
    kind: str,
    config: dict[str, Any],
    sites: Sites,
    *,
    rates: str = "attention_dropout",
    pad: str = "right",
    eager: bool = False,
    **more: Any,
) -> Case:
    """A case fed with tokens, the last sequence padded on one side, or none (`pad=""`)."""

    def forward(model: Any) -> Tensor:
        mask = {"attention_mask": padding(left=pad == "left")} if pad else {}
        named = {} if kind in ENCODERS else {"use_cache": False}
        return hidden(model, input_ids=tokens(), **mask, **named)

    return case(
        name, "transformers", lambda p: built(kind, config, p, rates, eager=eager), forward, sites, **more
    )


ENCODERS = ("Bert", "Roberta", "ModernBert", "DistilBert", "DebertaV2", "Albert", "Electra")
LLAMA = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": H,
    "num_key_value_heads": G,
}  # fmt: skip
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


def each(path: str, of: Callable[[Any, int], Heads], layers: int = LAYERS) -> Sites:
    """One site per layer, its path with the layer's index filled in."""
    return lambda model: {
        path.format(index): of(model.get_submodule(path.format(index)), index) for index in range(layers)
    }


def _llama(flags: str = "rope", head_dim: int = K) -> Sites:
    return each("layers.{}.self_attn", lambda m, _: separate(m.q_proj, m.k_proj, head_dim, flags))


def _normed(flags: str, *, one_plus: bool = False, head_dim: int = K) -> Sites:
    """Llama's projections, then a norm over each head whose gain belongs to the rows; Gemma stores it less one."""

    def of(m: Any, _: int) -> Heads:
        gains = {"q": array(m.q_norm.weight) + one_plus, "k": array(m.k_norm.weight) + one_plus}
        return site(
            cut(m.q_proj.weight, H, head_dim, gain=gains["q"]),
            cut(m.k_proj.weight, G, head_dim, gain=gains["k"]),
            flags,
        )

    return each("layers.{}.self_attn", of)


def _alternating(first: str, second: str, of: Callable[[Any, str], Heads]) -> Sites:
    return each("layers.{}.self_attn", lambda m, index: of(m, (first, second)[index]))


def _plain(m: Any, flags: str) -> Heads:
    return separate(m.q_proj, m.k_proj, K, flags)


def _gemma3(m: Any, flags: str) -> Heads:
    wq = cut(m.q_proj.weight, H, K, gain=1 + array(m.q_norm.weight))
    return site(wq, cut(m.k_proj.weight, G, K, gain=1 + array(m.k_norm.weight)), flags)


def _gpt2(m: Any, _: int = 0) -> Heads:
    return fused(m.c_attn.weight.T, H)


def _gpt2_cross(model: Any) -> dict[str, Heads]:
    found = {}
    for index, block in enumerate(model.h):
        found[f"h.{index}.attn"] = _gpt2(block.attn)
        m = block.crossattention
        found[f"h.{index}.crossattention"] = site(
            cut(m.q_attn.weight.T, H, K), cut(m.c_attn.weight.T, H, K), "cross"
        )
    return found


def _forward_gpt2_cross(model: Any) -> Tensor:
    context = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(4)).to(model.dtype)
    return hidden(
        model,
        input_ids=tokens(),
        attention_mask=padding(left=True),
        encoder_hidden_states=context,
        use_cache=False,
    )


def _interleaved(flags: str) -> Callable[[Any, int], Heads]:
    """Rows [q_h, k_h, v_h] of one head after those of the other."""

    def of(m: Any, _: int) -> Heads:
        weight = m.query_key_value.weight
        return site(cut(weight, H, K, stride=3 * K), cut(weight, H, K, start=K, stride=3 * K), flags)

    return of


def _falcon_multi_query(m: Any, _: int) -> Heads:
    weight = m.query_key_value.weight
    return site(cut(weight, H, K), cut(weight, 1, K, start=H * K), "rope")


def _falcon_grouped(m: Any, _: int) -> Heads:
    weight, group = m.query_key_value.weight, H // G
    block = (group + 2) * K
    wq = [wq for g in range(G) for wq in cut(weight, group, K, start=g * block)]
    return site(wq, cut(weight, G, K, start=group * K, stride=block), "rope")


def _big_code(m: Any, _: int) -> Heads:
    return site(cut(m.c_attn.weight, H, K), cut(m.c_attn.weight, 1, K, start=H * K))


def _phi3(m: Any, _: int) -> Heads:
    return site(cut(m.qkv_proj.weight, H, K), cut(m.qkv_proj.weight, G, K, start=H * K), "rope")


def _olmo2(m: Any, _: int) -> Heads:
    return separate(m.q_proj, m.k_proj, K, "rope qk_norm", q=m.q_norm.weight, k=m.k_norm.weight)


NOPE, ROPE, VALUE, RANK_Q, RANK_KV = 6, 4, 5, 14, 12


def _latent_keys(m: Any) -> list[Array]:
    """k_h = [W_kvb,h rows of k, norm gain, W_kva; the rotary rows that all heads share], without the rotation."""
    down, gain = array(m.kv_a_proj_with_mqa.weight), array(m.kv_a_layernorm.weight)
    latent = gain[:, None] * down[:RANK_KV]
    up = cut(m.kv_b_proj.weight, H, NOPE, stride=NOPE + VALUE)
    return [_stacked(rows @ latent, down[RANK_KV:]) for rows in up]


def _stacked(above: Array, below: Array) -> Array:
    joined: Array = array(torch.cat([torch.from_numpy(above), torch.from_numpy(below)]))
    return joined


def _latent(m: Any, _: int) -> Heads:
    if m.q_a_proj is None:
        return site(cut(m.q_proj.weight, H, NOPE + ROPE), _latent_keys(m), "rope")
    latent = array(m.q_a_layernorm.weight)[:, None] * array(m.q_a_proj.weight)
    wq = [rows @ latent for rows in cut(m.q_b_proj.weight, H, NOPE + ROPE)]
    return site(wq, _latent_keys(m), "rope")


MLA = {
    **LLAMA, "num_key_value_heads": H, "q_lora_rank": RANK_Q, "kv_lora_rank": RANK_KV, "qk_nope_head_dim": NOPE,
    "qk_rope_head_dim": ROPE, "v_head_dim": VALUE, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "rope_parameters": PLAIN_ROPE,
}  # fmt: skip


def _gated(model: Any) -> dict[str, Heads]:
    """Qwen3-Next: of each head's 2 K rows the first K are the query's, the others its gate's."""
    m = model.layers[1].self_attn
    wq = cut(m.q_proj.weight, H, K, stride=2 * K, gain=1 + array(m.q_norm.weight))
    return {
        "layers.1.self_attn": site(
            wq, cut(m.k_proj.weight, G, K, gain=1 + array(m.k_norm.weight)), "rope qk_norm"
        )
    }


QWEN3_NEXT = {
    **LLAMA, "head_dim": K, "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16,
}  # fmt: skip
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
GPT2 = {"n_embd": WIDTH, "n_head": H, "n_layer": LAYERS, "n_positions": 32}
GPT2_RATES = "embd_pdrop resid_pdrop attn_pdrop"
FALCON = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": H}
FALCON_RATES = "hidden_dropout attention_dropout"
BERT = {
    "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": H, "intermediate_size": 48,
    "max_position_embeddings": 32,
}  # fmt: skip
BERT_RATES = "hidden_dropout_prob attention_probs_dropout_prob"
GEMMA = {**LLAMA, "head_dim": K, "query_pre_attn_scalar": 5, "sliding_window": 4}


def _bert(flags: str = "") -> Sites:
    return each("encoder.layer.{}.attention.self", lambda m, _: separate(m.query, m.key, K, flags))


CASES: tuple[Case, ...] = (
    text("GPT-2", "GPT2", GPT2, each("h.{}.attn", _gpt2), rates=GPT2_RATES),
    text(
        "GPT-2, scaled by layer, eager", "GPT2", {**GPT2, "scale_attn_by_inverse_layer_idx": True},
        each("h.{}.attn", _gpt2), rates=GPT2_RATES, eager=True, pad="left",
    ),
    case(
        "GPT-2 with cross attention", "transformers",
        lambda p: built("GPT2", {**GPT2, "add_cross_attention": True}, p, GPT2_RATES), _forward_gpt2_cross, _gpt2_cross,
    ),
    text("GPT-BigCode, multi-query", "GPTBigCode", GPT2, each("h.{}.attn", _big_code), rates=GPT2_RATES),
    text("BERT", "Bert", BERT, _bert(), rates=BERT_RATES),
    text("BERT, eager", "Bert", BERT, _bert(), rates=BERT_RATES, eager=True),
    text("RoBERTa", "Roberta", {**BERT, "pad_token_id": 1}, _bert(), rates=BERT_RATES),
    text("Llama, grouped", "Llama", LLAMA, _llama()),
    text("Llama, eager, left padded", "Llama", LLAMA, _llama(), eager=True, pad="left"),
    text("Mistral, sliding window", "Mistral", {**LLAMA, "sliding_window": 4}, _llama("rope window")),
    text("Mixtral", "Mixtral", {**LLAMA, **MIXTRAL}, _llama()),
    text("Qwen2, biases", "Qwen2", LLAMA, _llama(), pad=""),
    text("Qwen3", "Qwen3", {**LLAMA, "head_dim": 12}, _normed("rope qk_norm", head_dim=12), pad="left"),
    text("Gemma", "Gemma", {**LLAMA, "head_dim": 12, "num_key_value_heads": 1}, _llama(head_dim=12)),
    text(
        "Gemma 2", "Gemma2", {**GEMMA, "attn_logit_softcapping": 5.0},
        _alternating("rope softcap window", "rope softcap", _plain),
    ),
    text(
        "Gemma 3", "Gemma3Text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
        _alternating("rope qk_norm window", "rope qk_norm", _gemma3),
    ),
    text("OLMo 2", "Olmo2", LLAMA, each("layers.{}.self_attn", _olmo2)),
    text(
        "gpt-oss", "GptOss",
        {**LLAMA, "head_dim": K, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4, "rope_parameters": PLAIN_ROPE},
        _alternating("rope sink window", "rope sink", _plain),
    ),
    text("Phi-3", "Phi3", LLAMA, each("layers.{}.self_attn", _phi3), rates="attention_dropout resid_pdrop"),
    text(
        "ModernBERT", "ModernBert",
        {**BERT, "local_attention": 6, "layer_types": ["full_attention", "sliding_attention"]},
        each("layers.{}.attn", lambda m, i: fused(m.Wqkv.weight, H, ("rope", "rope window")[i])),
        rates="attention_dropout embedding_dropout mlp_dropout",
    ),
    text(
        "GPT-NeoX", "GPTNeoX", BERT, each("layers.{}.attention", _interleaved("rope")),
        rates="hidden_dropout attention_dropout",
    ),
    text(
        "BLOOM", "Bloom", {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": H},
        each("h.{}.self_attention", _interleaved("bias")), rates="hidden_dropout attention_dropout",
    ),
    text(
        "Falcon, multi-query", "Falcon", {**FALCON, "multi_query": True}, each("h.{}.self_attention", _falcon_multi_query),
        rates=FALCON_RATES,
    ),
    text(
        "Falcon, ALiBi", "Falcon", {**FALCON, "alibi": True, "multi_query": False},
        each("h.{}.self_attention", _interleaved("bias")), rates=FALCON_RATES,
    ),
    text(
        "Falcon, grouped", "Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": G},
        each("h.{}.self_attention", _falcon_grouped), rates=FALCON_RATES,
    ),
    text(
        "GPT-J", "GPTJ", {**GPT2, "rotary_dim": 4},
        each("h.{}.attn", lambda m, _: separate(m.q_proj, m.k_proj, K, "rope")), rates=GPT2_RATES,
    ),
    text(
        "OPT", "OPT", {**BERT, "ffn_dim": 48, "word_embed_proj_dim": WIDTH},
        each("decoder.layers.{}.self_attn", lambda m, _: separate(m.q_proj, m.k_proj, K)),
        rates="dropout attention_dropout",
    ),
    text("DeepSeek-V3, latent attention", "DeepseekV3", MLA, each("layers.{}.self_attn", _latent)),
    text(
        "DeepSeek-V3, queries not compressed", "DeepseekV3", {**MLA, "q_lora_rank": None},
        each("layers.{}.self_attn", _latent), eager=True,
    ),
    text("Qwen3-Next, hybrid", "Qwen3Next", QWEN3_NEXT, _gated, skipped=("layers.0.linear_attn",), pad=""),
)  # fmt: skip
