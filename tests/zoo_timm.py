"""Cases: vision models of timm."""

from typing import Any

from torch import Tensor, nn
from zoo_case import BATCH, WIDTH, Case, Heads, case, cut, features, fused, imported, site

H, K = 4, 8
SMALL = {"num_classes": 5}
PLAIN = {**SMALL, "img_size": 16, "patch_size": 4, "embed_dim": WIDTH, "depth": 2, "num_heads": H}
SWIN = {
    **SMALL,
    "img_size": 16,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 1),
    "num_heads": (2, 4),
    "window_size": 4,
}


def _made(name: str, options: dict[str, Any], dropout: float, *, flash: bool = True) -> nn.Module:
    rates = dict.fromkeys(("proj_drop_rate", "attn_drop_rate", "drop_path_rate"), dropout)
    model: nn.Module = imported("timm").create_model(name, **options, **rates)
    if not flash:
        for module in model.modules():
            if "fused_attn" in vars(module):
                vars(module)["fused_attn"] = False
    return model


def _image(model: Any, size: int = 16) -> Tensor:
    scores: Tensor = model(features(model, BATCH, 3, size, size))
    return scores


def _fused_sites(model: nn.Module, flags: str) -> dict[str, Heads]:
    return {
        name: fused(module.qkv.weight, module.num_heads, flags)
        for name, module in model.named_modules()
        if hasattr(module, "qkv")
    }


def _normed_sites(model: Any) -> dict[str, Heads]:
    found = {}
    for index, block in enumerate(model.blocks):
        weight, gains = block.attn.qkv.weight, (block.attn.q_norm.weight, block.attn.k_norm.weight)
        wq, wk = cut(weight, H, K, gain=gains[0]), cut(weight, H, K, start=WIDTH, gain=gains[1])
        found[f"blocks.{index}.attn"] = site(wq, wk, "qk_norm")
    return found


def _pooled_sites(model: Any) -> dict[str, Heads]:
    pool = model.attn_pool
    return _fused_sites(model, "") | {
        "attn_pool": site(cut(pool.q.weight, H, K), cut(pool.kv.weight, H, K), "cross")
    }


def _head_first_sites(model: nn.Module) -> dict[str, Heads]:
    """CoAtNet's and MaxViT's rows are [q_h, k_h, v_h] of one head after those of the other; CoAtNet's qkv is a 1 x 1 convolution."""
    found = {}
    for name, module in model.named_modules():
        qkv = getattr(module, "qkv", None)
        if isinstance(qkv, nn.Module):
            weight = qkv.get_parameter("weight").flatten(1)
            found[name] = site(
                cut(weight, H, K, stride=3 * K), cut(weight, H, K, start=K, stride=3 * K), "bias"
            )
    return found


def _coat(block: str, dropout: float) -> nn.Module:
    maxxvit = imported("timm.models.maxxvit")
    config = maxxvit.MaxxVitCfg(
        embed_dim=(16, WIDTH), depths=(1, 1), block_type=("C", block), stem_width=16,
        transformer_cfg=maxxvit.MaxxVitTransformerCfg(
            dim_head=K, expand_first=True, window_size=(4, 4), grid_size=(4, 4), attn_drop=dropout, proj_drop=dropout
        ),
    )  # fmt: skip
    model: nn.Module = maxxvit.MaxxVit(config, img_size=32, num_classes=5)
    return model


CASES: tuple[Case, ...] = (
    case(
        "ViT", "timm", lambda p: _made("vit_tiny_patch16_224", PLAIN, p), _image, lambda m: _fused_sites(m, ""),
    ),
    case(
        "ViT, softmax", "timm", lambda p: _made("vit_tiny_patch16_224", PLAIN, p, flash=False), _image,
        lambda m: _fused_sites(m, ""),
    ),
    case(
        "ViT, QK-norm", "timm", lambda p: _made("vit_tiny_patch16_224", {**PLAIN, "qk_norm": True}, p), _image,
        _normed_sites,
    ),
    case(
        "SigLIP ViT, attention pool", "timm", lambda p: _made("vit_base_patch16_siglip_224", PLAIN, p), _image,
        _pooled_sites,
    ),
    case(
        "Swin", "timm", lambda p: _made("swin_tiny_patch4_window7_224", SWIN, p), _image,
        lambda m: _fused_sites(m, "bias"),
    ),
    case(
        "Swin V2, cosine", "timm", lambda p: _made("swinv2_tiny_window8_256", SWIN, p), _image,
        lambda m: _fused_sites(m, "bias qk_norm"),
    ),
    case(
        "EVA-02, rotary", "timm", lambda p: _made("eva02_tiny_patch14_224", PLAIN, p), _image,
        lambda m: _fused_sites(m, "rope"),
    ),
    case(
        "BEiT, relative bias", "timm", lambda p: _made("beit_base_patch16_224", PLAIN, p), _image,
        lambda m: _fused_sites(m, "bias"),
    ),
    case(
        "CoAtNet, convolution and attention", "timm", lambda p: _coat("T", p), lambda m: _image(m, 32),
        _head_first_sites,
    ),
    case("MaxViT", "timm", lambda p: _coat("M", p), lambda m: _image(m, 32), _head_first_sites),
)  # fmt: skip
