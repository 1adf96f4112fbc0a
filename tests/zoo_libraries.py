"""Cases: x-transformers, diffusers and vit-pytorch."""

from dataclasses import replace
from typing import Any

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
    imported,
    padding,
    separate,
    site,
    tokens,
)

H, G, K = 4, 2, 8


# --- x-transformers -----------------------------------------------------------------------------------------


def _wrapped(dropout: float, kind: str = "Decoder", **options: Any) -> nn.Module:
    x = imported("x_transformers")
    layers = getattr(x, kind)(
        dim=WIDTH,
        depth=2,
        heads=H,
        attn_dim_head=K,
        attn_dropout=dropout,
        ff_dropout=dropout,
        ff_mult=2,
        **options,
    )
    model: nn.Module = x.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=LENGTH, attn_layers=layers)
    return model


def _x_heads(m: Any, flags: str) -> Heads:
    """Grouped heads are tiled: query head h has key head h mod G. Gains, where there are any, are (heads, 1, K)."""
    q_gain, k_gain = (getattr(m, f"qk_norm_{side}_scale", 1) for side in "qk")
    heads, kv_heads = m.to_q.weight.shape[0] // K, m.to_k.weight.shape[0] // K
    wq = cut(m.to_q.weight, heads, K, gain=q_gain if isinstance(q_gain, Tensor) else None)
    wk = cut(m.to_k.weight, kv_heads, K, gain=k_gain if isinstance(k_gain, Tensor) else None)
    return site(wq, wk, flags, tiled=True)


def _x_sites(model: nn.Module, flags: str = "", cross: str = "cross") -> dict[str, Heads]:
    """Self attention is named by its place among the layers; a decoder's cross attention follows each."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "to_q") and hasattr(module, "to_k"):
            is_cross = _layer_kind(model, name) == "c"
            found[name] = _x_heads(module, cross if is_cross else flags)
    return found


def _layer_kind(model: nn.Module, name: str) -> str:
    layers, _, rest = name.partition(".layers.")
    kinds: Any = model.get_submodule(layers)
    return str(kinds.layer_types[int(rest.split(".")[0])])


def _x_case(name: str, flags: str = "", **options: Any) -> Case:
    return case(
        name, "x-transformers", lambda p: _wrapped(p, **options), lambda m: _output(m(tokens(), mask=padding() == 1)),
        lambda m: _x_sites(m, flags),
    )  # fmt: skip


def _output(value: Any) -> Tensor:
    result: Tensor = value.sample if hasattr(value, "sample") else value
    return result


def _forward_x_cross(model: Any) -> Tensor:
    return _output(model(tokens(), context=features(model, BATCH, 9, WIDTH)))


# --- diffusers ----------------------------------------------------------------------------------------------


def _diffusion_sites(model: nn.Module) -> dict[str, Heads]:
    return {
        name: separate(
            m.to_q, m.to_k, m.to_q.weight.shape[0] // m.heads, "cross" if name.endswith("attn2") else ""
        )
        for name, m in model.named_modules()
        if hasattr(m, "to_q") and hasattr(m, "to_k")
    }


def _block(dropout: float) -> nn.Module:
    attention = imported("diffusers.models.attention")
    model: nn.Module = attention.BasicTransformerBlock(WIDTH, H, K, dropout=dropout, cross_attention_dim=24)
    return model


def _forward_block(model: Any) -> Tensor:
    return _output(
        model(features(model, BATCH, LENGTH, WIDTH), encoder_hidden_states=features(model, BATCH, 7, 24))
    )


def _unet(dropout: float) -> nn.Module:
    model: nn.Module = imported("diffusers").UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, WIDTH), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24, attention_head_dim=H, norm_num_groups=4, dropout=dropout,
    )  # fmt: skip
    return model


def _forward_unet(model: Any) -> Tensor:
    return _output(
        model(features(model, BATCH, 4, 8, 8), 5, encoder_hidden_states=features(model, BATCH, 7, 24))
    )


def _flux(dropout: float) -> nn.Module:
    del dropout  # the architecture knows none
    model: nn.Module = imported("diffusers").FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=K, num_attention_heads=H,
        joint_attention_dim=WIDTH, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return model


def _forward_flux(model: Any) -> Tensor:
    return _output(
        model(
            features(model, BATCH, 16, 4), encoder_hidden_states=features(model, BATCH, 7, WIDTH),
            pooled_projections=features(model, BATCH, 16), timestep=features(model, BATCH).abs(),
            img_ids=features(model, 16, 3), txt_ids=features(model, 7, 3),
        )
    )  # fmt: skip


def _flux_sites(model: Any) -> dict[str, Heads]:
    """The first block attends over text and image together, each with projections of its own: no one Wq and Wk."""
    found = {}
    for name in ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn"):
        m = model.get_submodule(name)
        heads = separate(m.to_q, m.to_k, K, "rope qk_norm", q=m.norm_q.weight, k=m.norm_k.weight)
        found[name] = replace(heads, mixed=m.added_kv_proj_dim is not None)
    return found


# --- vit-pytorch --------------------------------------------------------------------------------------------


def _vit(module: str, kind: str, **options: Any) -> nn.Module:
    model: nn.Module = getattr(imported(f"vit_pytorch.{module}"), kind)(
        image_size=16,
        patch_size=4,
        num_classes=5,
        dim=WIDTH,
        depth=2,
        heads=H,
        mlp_dim=48,
        dim_head=K,
        **options,
    )
    return model


def _image(model: Any) -> Tensor:
    return _output(model(features(model, BATCH, 3, 16, 16)))


def _vit_sites(model: nn.Module) -> dict[str, Heads]:
    return {name: fused(m.to_qkv.weight, H) for name, m in model.named_modules() if hasattr(m, "to_qkv")}


def _normed_vit_sites(model: nn.Module) -> dict[str, Heads]:
    """Its norm is x / |x| * sqrt(K) * gamma: the root-mean-square norm with gain gamma, one per head."""
    found = {}
    for name, m in model.named_modules():
        if hasattr(m, "to_qkv") and hasattr(m, "q_norm"):
            weight: Any = m.to_qkv.weight
            gains: Any = (m.q_norm.gamma, m.k_norm.gamma)
            wq, wk = cut(weight, H, K, gain=gains[0]), cut(weight, H, K, start=H * K, gain=gains[1])
            found[name] = site(wq, wk, "qk_norm")
    return found


CASES: tuple[Case, ...] = (
    _x_case("decoder"),
    _x_case("decoder, flash", attn_flash=True),
    _x_case("decoder, grouped and tiled", attn_kv_heads=G),
    _x_case("decoder, grouped and tiled, flash, rotary", "rope", attn_kv_heads=G, attn_flash=True, rotary_pos_emb=True),
    _x_case("decoder, QK-norm", "qk_norm", attn_qk_norm=True),
    _x_case("decoder, QK-norm with gains", "qk_norm", attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    _x_case("decoder, ALiBi", "bias", alibi_pos_bias=True),
    _x_case("encoder, T5 relative bias", "bias", kind="Encoder", rel_pos_bias=True),
    case(
        "decoder with cross attention", "x-transformers", lambda p: _wrapped(p, cross_attend=True), _forward_x_cross, _x_sites,
    ),
    case("BasicTransformerBlock", "diffusers", _block, _forward_block, _diffusion_sites),
    case("Flux, joint attention", "diffusers", _flux, _forward_flux, _flux_sites),
    case("UNet2DCondition", "diffusers", _unet, _forward_unet, _diffusion_sites),
    case("ViT", "vit-pytorch", lambda p: _vit("vit", "ViT", dropout=p, emb_dropout=p), _image, _vit_sites),
    case("SimpleViT", "vit-pytorch", lambda _: _vit("simple_vit", "SimpleViT"), _image, _vit_sites),
    case(
        "SimpleViT, QK-norm", "vit-pytorch", lambda _: _vit("simple_vit_with_qk_norm", "SimpleViT"), _image,
        _normed_vit_sites,
    ),
    case("DeepViT, mixed maps", "vit-pytorch", lambda p: _vit("deepvit", "DeepViT", dropout=p), _image, _vit_sites),
)  # fmt: skip
