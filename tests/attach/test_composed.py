"""Spectra of projections that are more than rows of one matrix: gains, latents, tensors, and what cannot be had.

Shape suffixes: B sequences, H query heads, T rows, K head size, D width, R size of a latent.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live import record, site_named
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from diagnostics.store.read import Run

B, T, D, H, K = 2, 9, 24, 4, 6
NOPE, ROPE, RANK_Q, RANK_K = 4, 2, 10, 8
SDPA = functional.scaled_dot_product_attention


def rotated(x_bhtk: Tensor) -> Tensor:
    """RoPE on halves."""
    half = x_bhtk.shape[-1] // 2
    angle_tk = torch.arange(x_bhtk.shape[2])[:, None] * (0.5 ** torch.arange(half))[None]
    cos, sin = angle_tk.cos().to(x_bhtk), angle_tk.sin().to(x_bhtk)
    a, b = x_bhtk[..., :half], x_bhtk[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def by_head(y_btf: Tensor, size: int = K) -> Tensor:
    split: Tensor = y_btf.unflatten(-1, (-1, size)).transpose(1, 2)
    return split


def rms(x: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Attention(nn.Module):
    """Anything that makes q and k; values are the input's own features."""

    def __init__(self, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def queries_keys(self, x_btd: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def forward(self, x_btd: Tensor) -> Tensor:
        q, k = self.queries_keys(x_btd)
        v = x_btd[..., :K].unsqueeze(1).expand(-1, k.shape[1], -1, -1)
        if v.shape[2] != k.shape[2]:
            v = torch.ones_like(k)
        return SDPA(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


def attention(parts: dict[str, Any], make: Callable[[Any, Tensor], tuple[Tensor, Tensor]]) -> Attention:
    found = Attention(**parts)
    found.queries_keys = make.__get__(found)  # type: ignore[method-assign]
    return found


def recorded(
    module: nn.Module, tmp_path: Path, *, autocast: bool = False, rate: float = 0.0, steps: int = 1
) -> Any:
    model, x = (
        nn.ModuleDict({"attn": module}),
        torch.randn(B, T, D, generator=torch.Generator().manual_seed(3)),
    )

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out: Tensor = module(x)
        return (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum()

    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    run, recorder = record(model, tmp_path / "run", loss, optimizer=optimizer, steps=steps)
    return run, site_named(recorder, "attn")


def assert_spectra(run: Run, pairs: list[tuple[Tensor, Tensor]], step: int = 0, limit: float = 1e-6) -> None:
    """Against numpy's singular values of the whole D x D product; the stored values are float32 (6e-8)."""
    rows = run.spectra()
    rows = rows[rows["step"] == step].sort_values("head")
    assert len(rows) == len(pairs)
    for values, (wq_kd, wk_kd) in zip(rows["singular_values"], pairs, strict=True):
        product = wq_kd.detach().double().numpy().T @ wk_kd.detach().double().numpy()
        truth = np.linalg.svd(product, compute_uv=False)[: len(values)]
        assert np.abs(np.asarray(values) - truth).max() < limit * truth[0]


def heads_of(weight_od: Tensor, gain: Tensor | float = 1.0) -> list[Tensor]:
    """The heads' rows, multiplied by a gain that broadcasts to (heads, K)."""
    rows_hkd = weight_od.detach().double().unflatten(0, (-1, K))
    gain_hk = torch.as_tensor(gain).detach().double().expand(rows_hkd.shape[:2])
    return list(rows_hkd * gain_hk[..., None])


# --- gains --------------------------------------------------------------------------------------------------


def gain(*shape: int, around: float = 1.0) -> nn.Parameter:
    return nn.Parameter(around + 0.3 * torch.randn(shape))


def _norm_per_head(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k = rms(by_head(self.a(x))) * self.g, rms(by_head(self.b(x))) * self.s
    return rotated(q), rotated(k)


def _gain_less_one(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k = rms(by_head(self.a(x))) * (1 + self.g), rms(by_head(self.b(x))) * (1 + self.s)
    return rotated(q), rotated(k)


def _layer_norm(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k = by_head(self.a(x)), by_head(self.b(x))
    return rotated(functional.layer_norm(q, (K,), self.g, self.o)), functional.layer_norm(k, (K,), self.s)


def _norm_over_all(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return rotated(by_head(rms(self.a(x)) * self.g)), rotated(by_head(rms(self.b(x)) * self.s))


def _norm_after_rotation(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k = rotated(by_head(self.a(x))), rotated(by_head(self.b(x)))
    return rms(q) * self.g, rms(k) * self.s


def _scaled_only(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return rotated(by_head(self.a(x)) * self.g), rotated(by_head(self.b(x)) * self.s)


GAINS: dict[str, tuple[Any, dict[str, tuple[int, ...]], float, tuple[str, ...]]] = {
    "one gain for all heads": (_norm_per_head, {"g": (K,), "s": (K,)}, 0.0, ("rope", "qk_norm")),
    "a gain for each head": (_norm_per_head, {"g": (H, 1, K), "s": (2, 1, K)}, 0.0, ("rope", "qk_norm")),
    "stored less one": (_gain_less_one, {"g": (K,), "s": (K,)}, 1.0, ("rope", "qk_norm")),
    "layer norm with and without bias": (
        _layer_norm, {"g": (K,), "s": (K,), "o": (K,)}, 0.0, ("rope", "qk_norm"),
    ),
    "norm over all heads": (_norm_over_all, {"g": (H * K,), "s": (2 * K,)}, 0.0, ("rope", "qk_norm")),
    "norm after the rotation": (_norm_after_rotation, {"g": (K,), "s": (K,)}, 0.0, ("rope", "qk_norm")),
    "gains without a norm": (_scaled_only, {"g": (K,), "s": (K,)}, 0.0, ("rope",)),
}  # fmt: skip


def _normed(name: str) -> Attention:
    torch.manual_seed(5)
    make, shapes, plus, _ = GAINS[name]
    gains = {key: gain(*shape, around=1.0 - plus) for key, shape in shapes.items()}
    return attention({"a": nn.Linear(D, H * K), "b": nn.Linear(D, 2 * K), **gains}, make)


def _gained_pairs(module: Any, plus: float) -> list[tuple[Tensor, Tensor]]:
    wq = heads_of(module.a.weight, (module.g + plus).reshape(-1, K))
    wk = heads_of(module.b.weight, (module.s + plus).reshape(-1, K))
    return [(wq[head], wk[head // 2]) for head in range(H)]


@pytest.mark.parametrize("name", GAINS)
def test_gains_are_found_without_a_name_and_folded_into_the_rows(name: str, tmp_path: Path) -> None:
    module = _normed(name)
    run, site = recorded(module, tmp_path)
    assert (site.flags, site.verified, site.kv_heads, site.reason) == (GAINS[name][3], "probe", 2, "")
    assert "gain g folded into q" in site.layout
    assert_spectra(run, _gained_pairs(module, GAINS[name][2]))


def test_each_measured_step_folds_the_gains_of_its_own_forward(tmp_path: Path) -> None:
    module = _normed("one gain for all heads")
    first = _gained_pairs(module, 0.0)
    run, _ = recorded(module, tmp_path, rate=1e-2, steps=2)
    assert_spectra(run, first, step=0)
    with pytest.raises(AssertionError):  # the step moved them
        assert_spectra(run, first, step=1)


def test_gains_are_verified_under_autocast_too(tmp_path: Path) -> None:
    module = _normed("one gain for all heads")
    run, site = recorded(module, tmp_path, autocast=True)
    assert site.reason == ""
    assert_spectra(run, _gained_pairs(module, 0.0))


def _exponential(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return rms(by_head(self.a(x))) * self.g.exp(), rms(by_head(self.b(x)))


def test_a_gain_of_an_unknown_form_is_not_folded_and_there_is_no_spectrum(tmp_path: Path) -> None:
    torch.manual_seed(5)
    module = attention(
        {"a": nn.Linear(D, H * K), "b": nn.Linear(D, H * K), "g": gain(K, around=0.0)}, _exponential
    )
    run, site = recorded(module, tmp_path)
    assert "attn.g stands between" in site.reason
    assert run.spectra().empty
    assert len(run.attention()) == H


def test_a_frozen_gain_is_not_silently_left_out(tmp_path: Path) -> None:
    module = attention(
        {"q": nn.Linear(D, H * K), "k": nn.Linear(D, H * K), "q_norm": nn.RMSNorm(K).requires_grad_(requires_grad=False)},
        lambda self, x: (self.q_norm(by_head(self.q(x))), by_head(self.k(x))),
    )  # fmt: skip
    run, site = recorded(module, tmp_path)
    assert "q_norm.weight is frozen" in site.reason
    assert run.spectra().empty


def test_under_checkpointing_names_do_not_answer_for_a_norm_over_q_and_k(tmp_path: Path) -> None:
    module: Any = attention(
        {"q": nn.Linear(D, H * K), "k": nn.Linear(D, H * K), "q_norm": nn.RMSNorm(K)},
        lambda self, x: (self.q_norm(by_head(self.q(x))), by_head(self.k(x))),
    )
    module.num_heads = H
    inner = module.forward
    module.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    run, site = recorded(module, tmp_path)
    assert "checkpointing was active" in site.reason
    assert "q_norm.weight" in site.reason
    assert run.spectra().empty


# --- latents ------------------------------------------------------------------------------------------------


def _latent(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Multi-head latent attention under odd names; rotary features first or last."""
    q = by_head(self.q2(rms(self.q1(x)) * self.gq) if hasattr(self, "q2") else self.q1(x), NOPE + ROPE)
    down = self.k1(x)
    k_nope = by_head(self.k2(rms(down[..., :RANK_K]) * self.gk), NOPE)
    k_rope = rotated(down[..., None, :, RANK_K:]).expand(-1, H, -1, -1)
    q_nope, q_rope = q[..., :NOPE], rotated(q[..., NOPE:])
    if self.rope_first:
        return torch.cat([q_rope, q_nope], -1), torch.cat([k_rope, k_nope], -1)
    return torch.cat([q_nope, q_rope], -1), torch.cat([k_nope, k_rope], -1)


@pytest.mark.parametrize("rope_first", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
def test_latent_attention_is_composed_to_the_input(
    compressed: bool,  # noqa: FBT001 - a parameter of the test
    rope_first: bool,  # noqa: FBT001 - a parameter of the test
    tmp_path: Path,
) -> None:
    torch.manual_seed(6)
    parts: dict[str, Any] = {
        "k1": nn.Linear(D, RANK_K + ROPE, bias=False), "k2": nn.Linear(RANK_K, H * NOPE, bias=False), "gk": gain(RANK_K),
        "q1": nn.Linear(D, RANK_Q if compressed else H * K, bias=False),
    }  # fmt: skip
    if compressed:
        parts |= {"q2": nn.Linear(RANK_Q, H * K, bias=False), "gq": gain(RANK_Q)}
    module: Any = attention(parts, _latent)
    module.rope_first = rope_first
    run, site = recorded(module, tmp_path)

    assert (site.heads, site.kv_heads, site.head_dim, site.flags) == (H, H, K, ("rope",))
    assert "k2 diag(gain) k1" in site.layout
    w = {name: part.weight.detach().double() for name, part in parts.items() if isinstance(part, nn.Linear)}
    wq = w["q2"] @ torch.diag(module.gq.detach().double()) @ w["q1"] if compressed else w["q1"]
    k_nope = w["k2"] @ torch.diag(module.gk.detach().double()) @ w["k1"][:RANK_K]
    pairs = [
        (
            wq[head * K : (head + 1) * K],
            torch.cat([k_nope[head * NOPE : (head + 1) * NOPE], w["k1"][RANK_K:]]),
        )
        for head in range(H)
    ]
    assert_spectra(run, pairs)


def test_what_is_embedded_before_attention_is_no_part_of_its_projections(tmp_path: Path) -> None:
    """Norm and bottleneck in the same module, but q and k multiply one tensor: that is their input."""
    torch.manual_seed(7)

    def make(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = rms(self.embed(x))
        return by_head(self.q(h)), by_head(self.k(h))

    module: Any = attention(
        {"embed": nn.Linear(D, 10), "q": nn.Linear(10, H * K), "k": nn.Linear(10, H * K)}, make
    )
    run, _ = recorded(module, tmp_path)
    assert_spectra(run, list(zip(heads_of(module.q.weight), heads_of(module.k.weight), strict=True)))


# --- ways to multiply ---------------------------------------------------------------------------------------


def _einsum(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.einsum("btd,dhk->bhtk", x, self.q), torch.einsum("hkd,...td->...htk", self.k, x)


def _convolution(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k = self.qk(x.mT.unflatten(-1, (3, 3))).flatten(2).mT.chunk(2, dim=-1)
    return by_head(q), by_head(k)


def _transposed_views(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return by_head(x @ self.w.T[:, : H * K]), by_head(functional.linear(x, self.w[H * K :]))


def _mixed_over_tokens(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A depthwise convolution over tokens after the projection (arXiv 2109.08668)."""
    q, k = self.q(x), self.k(x)
    return by_head(self.mix(q.mT).mT), by_head(k)


WAYS: dict[str, tuple[Callable[[], dict[str, Any]], Any, Callable[[Any], tuple[Tensor, Tensor]]]] = {
    "tensors and einsum": (
        lambda: {"q": gain(D, H, K, around=0.0), "k": gain(H, K, D, around=0.0)}, _einsum,
        lambda m: (m.q.flatten(1).T, m.k.flatten(0, 1)),
    ),
    "convolution of size one": (
        lambda: {"qk": nn.Conv2d(D, 2 * H * K, 1)}, _convolution, lambda m: m.qk.weight.flatten(1).chunk(2),
    ),
    "views of a parameter": (
        lambda: {"w": gain(2 * H * K, D, around=0.0)}, _transposed_views, lambda m: m.w.chunk(2),
    ),
    "tokens mixed afterwards": (
        lambda: {"q": nn.Linear(D, H * K), "k": nn.Linear(D, H * K), "mix": nn.Conv1d(H * K, H * K, 3, padding=1, groups=H * K, bias=False)},
        _mixed_over_tokens, lambda m: (m.q.weight, m.k.weight),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WAYS)
def test_the_rows_are_found_however_the_product_is_written(name: str, tmp_path: Path) -> None:
    torch.manual_seed(8)
    parts, make, weights = WAYS[name]
    module = attention(parts(), make)
    run, site = recorded(module, tmp_path)
    assert (site.verified, site.reason) == ("probe", "")
    wq_od, wk_od = weights(module)
    assert_spectra(run, list(zip(heads_of(wq_od), heads_of(wk_od), strict=True)))


# --- what has no one Wq and Wk ------------------------------------------------------------------------------


def _low_rank_update(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return by_head(self.q(x) + self.up(self.down(x))), by_head(self.k(x))


def _two_streams(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (
        torch.cat([first(x[:, :4]), second(x[:, 4:])], 1)
        for first, second in ((self.q, self.q2), (self.k, self.k2))
    )
    return rotated(rms(by_head(q))), rotated(rms(by_head(k)))


def _merged_weight(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return by_head(functional.linear(x, self.q.weight * 2.0)), by_head(self.k(x))


WITHOUT: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "a sum of two": (_low_rank_update, "sum of several projections", ()),
    "a projection for each stream": (_two_streams, "different tokens", ("rope", "qk_norm")),
    "a weight that is computed": (_merged_weight, "product with a", ()),
}


@pytest.mark.parametrize("name", WITHOUT)
def test_what_has_no_one_projection_has_no_spectra_and_says_why_whatever_the_names(
    name: str, tmp_path: Path
) -> None:
    torch.manual_seed(9)
    make, reason, flags = WITHOUT[name]
    linear = {key: nn.Linear(D, H * K) for key in ("q", "k", "q2", "k2")}
    module: Any = attention({**linear, "down": nn.Linear(D, 3), "up": nn.Linear(3, H * K)}, make)
    module.num_heads = H
    run, site = recorded(module, tmp_path)
    assert reason in site.reason
    assert site.flags == flags
    assert run.spectra().empty
    assert len(run.attention()) == H


def test_a_backward_hook_of_the_models_own_runs_as_often_as_without_a_recorder(tmp_path: Path) -> None:
    calls: list[str] = []
    module = attention(
        {"q": nn.Linear(D, H * K), "k": nn.Linear(D, H * K), "norm": nn.RMSNorm(K)},
        lambda self, x: (self.norm(by_head(self.q(x))), by_head(self.k(x))),
    )
    module.get_submodule("norm").register_full_backward_hook(lambda *_: calls.append("module"))
    _, site = recorded(module, tmp_path)
    assert calls == ["module"]
    assert "backward hook" in site.layout + site.reason
