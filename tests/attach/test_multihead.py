"""nn.MultiheadAttention and torch's transformers, in every way they are called.

Shape suffixes: B sequences, H heads, T query rows, S keys, K head size, D width.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from live import assert_attention, assert_spectra, causal, expected_attention, record, site_named
from torch import Tensor, nn

B, T, S, D, H = 3, 6, 9, 16, 4
K = D // H


def projections(mha: nn.MultiheadAttention) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Wq, Wk, bq, bk."""
    if mha._qkv_same_embed_dim:
        weight_q, weight_k = mha.in_proj_weight[:D], mha.in_proj_weight[D : 2 * D]
    else:
        weight_q, weight_k = mha.q_proj_weight, mha.k_proj_weight
    bias = torch.zeros(3 * D) if mha.in_proj_bias is None else mha.in_proj_bias
    return weight_q, weight_k, bias[:D], bias[D : 2 * D]


def heads_of(y_btd: Tensor) -> Tensor:
    return y_btd.reshape(*y_btd.shape[:-1], H, K).transpose(1, 2)


def queries_keys(mha: nn.MultiheadAttention, x_btd: Tensor, m_bsd: Tensor) -> tuple[Tensor, Tensor]:
    wq, wk, bq, bk = (p.detach().double() for p in projections(mha))
    q, k = x_btd.double() @ wq.t() + bq, m_bsd.double() @ wk.t() + bk
    if mha.bias_k is not None:
        k = torch.cat([k, mha.bias_k.detach().double().expand(k.shape[0], 1, D)], dim=1)
    if mha.add_zero_attn:
        k = torch.cat([k, k.new_zeros(k.shape[0], 1, D)], dim=1)
    return heads_of(q), heads_of(k)


def check(
    run: Any, name: str, mha: nn.MultiheadAttention, x: Tensor, m: Tensor, added: Tensor | None
) -> None:
    q, k = queries_keys(mha, x, m)
    assert_attention(run, name, expected_attention(q, k, range(H), K**-0.5, added))
    wq, wk, _, _ = projections(mha)
    assert_spectra(run, name, list(wq.reshape(H, K, -1)), list(wk.reshape(H, K, -1)))


def spread(mha: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """Larger weights and biases, so that entropies differ from those of uniform attention."""
    with torch.no_grad():
        for parameter in mha.parameters():
            parameter.normal_(std=0.5)
    return mha


PADDING = torch.zeros(B, S, dtype=torch.bool)
PADDING[1, 6:], PADDING[2, 3:] = True, True
HIDDEN = torch.rand(T, S, generator=torch.Generator().manual_seed(3)) < 0.3
HIDDEN[:, 0] = False
BIAS_3D = torch.randn(B * H, T, S, generator=torch.Generator().manual_seed(4))
WHERE_PADDED = torch.zeros(B, 1, 1, S).masked_fill(PADDING[:, None, None], -torch.inf)
WHERE_HIDDEN = torch.zeros(T, S).masked_fill(HIDDEN, -torch.inf)
MASKS: dict[str, tuple[dict[str, Tensor], Tensor | None]] = {
    "none": ({}, None),
    "bool, 2-D": ({"attn_mask": HIDDEN}, WHERE_HIDDEN),
    "bool, 3-D": ({"attn_mask": HIDDEN.expand(B * H, T, S)}, WHERE_HIDDEN),
    "float, 2-D": ({"attn_mask": BIAS_3D[0]}, BIAS_3D[0]),
    "float, 3-D": ({"attn_mask": BIAS_3D}, BIAS_3D.view(B, H, T, S)),
    "padding": ({"key_padding_mask": PADDING}, WHERE_PADDED),
    "padding and bool": ({"key_padding_mask": PADDING, "attn_mask": HIDDEN}, WHERE_PADDED + WHERE_HIDDEN),
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_masks_and_padding_count_as_they_do_in_the_softmax(
    mask: str, *, need_weights: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    mha = spread(nn.MultiheadAttention(D, H, batch_first=True))
    x, m = torch.randn(B, T, D), torch.randn(B, S, D)
    given, added = MASKS[mask]
    run, recorder = record(
        mha, tmp_path / "run", lambda: mha(x, m, m, need_weights=need_weights, **given)[0].square().mean()
    )
    site = site_named(recorder, "")
    flags = ("bias", "cross") if mask.startswith("float") else ("cross",)
    assert (site.heads, site.kv_heads, site.head_dim, site.verified, site.flags) == (H, H, K, "call", flags)
    check(run, "", mha, x, m, added)


KINDS: dict[str, dict[str, Any]] = {
    "batch first": {"batch_first": True},
    "rows first": {},
    "other widths": {"kdim": 10, "vdim": 7, "batch_first": True},
    "without bias": {"bias": False, "batch_first": True},
    "bias_k": {"add_bias_kv": True, "batch_first": True},
    "zero key": {"add_zero_attn": True, "batch_first": True},
    "bias_k and zero key": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_every_kind_of_multihead_attention_is_measured_right(
    kind: str, *, padded: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    mha = spread(nn.MultiheadAttention(D, H, **KINDS[kind]))
    x, m = torch.randn(B, T, D), torch.randn(B, S, mha.kdim)
    values = torch.randn(B, S, mha.vdim)
    arguments = [x, m, values] if mha.batch_first else [y.transpose(0, 1) for y in (x, m, values)]
    more = {"key_padding_mask": PADDING} if padded else {}
    run, _ = record(mha, tmp_path / "run", lambda: mha(*arguments, **more)[0].square().mean())
    extra = (mha.bias_k is not None) + mha.add_zero_attn
    added = nn.functional.pad(WHERE_PADDED, (0, extra)) if padded else None
    check(run, "", mha, x, m, added)


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_is_not_flagged_as_cross_whatever_comes_first(
    *, batch_first: bool, tmp_path: Path
) -> None:
    mha = nn.MultiheadAttention(D, H, batch_first=batch_first)
    x = torch.randn(B, T, D)
    _, recorder = record(mha, tmp_path / "run", lambda: mha(x, x, x)[0].square().sum())
    assert site_named(recorder, "").flags == ()
    _, recorder = record(mha, tmp_path / "other", lambda: mha(x, x, x.clone())[0].square().sum())
    assert site_named(recorder, "").flags == ()


def test_a_sequence_without_a_batch_is_one_sequence(tmp_path: Path) -> None:
    mha = spread(nn.MultiheadAttention(D, H))
    x = torch.randn(T, D)
    run, _ = record(mha, tmp_path / "run", lambda: mha(x, x, x)[0].square().sum())
    check(run, "", mha, x[None], x[None], None)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")  # torch says that norm_first has no nested path
@pytest.mark.parametrize("norm_first", [True, False])
def test_an_encoder_and_a_decoder_show_self_and_cross_attention_of_every_layer(
    *,
    norm_first: bool,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = nn.Transformer(
        D, H, 2, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            spread(module)
    source, target = torch.randn(B, S, D), torch.randn(B, T, D)
    inputs: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            given = [*args, *(kwargs[key] for key in ("query", "key") if key in kwargs)]
            inputs[name] = (given[0].detach().clone(), given[1].detach().clone())

        return hook

    handles = [
        module.register_forward_pre_hook(keep(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    ]
    mask = causal(T)
    model(source, target, tgt_mask=mask)  # the inputs, seen without the recorder
    for handle in handles:
        handle.remove()
    run, recorder = record(
        model, tmp_path / "run", lambda: model(source, target, tgt_mask=mask).square().mean()
    )
    names = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    assert [site.name for site in recorder.sites] == names
    assert len(names) == 6
    for name in names:
        crossed = name.endswith("multihead_attn")
        assert site_named(recorder, name).flags == (("cross",) if crossed else ())
        mha = model.get_submodule(name)
        assert isinstance(mha, nn.MultiheadAttention)
        decoder_self = name.startswith("decoder") and not crossed
        check(run, name, mha, *inputs[name], mask if decoder_self else None)
