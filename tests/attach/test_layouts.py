"""Every way in which q and k may lie in the parameters: found, named, and measured right.

Shape suffixes: B sequences, H query heads, G key heads, T rows, K head size, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from live import assert_attention, assert_spectra, causal, expected_attention, record, site_named
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.record.recorder import Recorder

B, T, D, H, K = 3, 7, 24, 4, 6
SDPA = functional.scaled_dot_product_attention


def rotated(x_bhtk: Tensor) -> Tensor:
    """RoPE on halves, whatever dtype."""
    half = x_bhtk.shape[-1] // 2
    angle_tk = torch.arange(x_bhtk.shape[2])[:, None] * (0.5 ** torch.arange(half))[None]
    cos, sin = angle_tk.cos().to(x_bhtk), angle_tk.sin().to(x_bhtk)
    a, b = x_bhtk[..., :half], x_bhtk[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def by_head(y_btf: Tensor, rows: list[list[int]]) -> Tensor:
    """(B, heads, T, K) gathered feature by feature."""
    return torch.stack([y_btf[..., row] for row in rows], dim=1)


def plain_rows(heads: int, start: int = 0, stride: int = K) -> list[list[int]]:
    return [[start + stride * head + k for k in range(K)] for head in range(heads)]


class Separate(nn.Module):
    """Separate projections under any names, any pairing of heads, and what may stand behind them."""

    def __init__(
        self,
        names: tuple[str, str],
        kv_heads: int = H,
        pairing: str = "native",
        behind: str = "",
        key_width: int = D,
    ) -> None:
        super().__init__()
        self.n, self.g, self.names, self.pairing, self.behind = H, kv_heads, names, pairing, behind
        self.add_module(names[0], nn.Linear(D, H * K))
        self.add_module(names[1], nn.Linear(key_width, kv_heads * K))
        self.value = nn.Linear(key_width, kv_heads * K)
        self.out = nn.Linear(H * K, D)
        if behind == "norm per head":
            self.norm_q: nn.Module = nn.LayerNorm(K)
            self.norm_k: nn.Module = nn.LayerNorm(K)
        if behind == "norm over the width":
            self.norm_q, self.norm_k = nn.RMSNorm(H * K), nn.RMSNorm(kv_heads * K)

    def queries_keys(self, x_btd: Tensor, memory_bsd: Tensor) -> tuple[Tensor, Tensor]:
        q, k = getattr(self, self.names[0])(x_btd), getattr(self, self.names[1])(memory_bsd)
        if self.behind == "norm over the width":
            q, k = self.norm_q(q), self.norm_k(k)
        q, k = (y.unflatten(-1, (-1, K)).transpose(1, 2) for y in (q, k))
        if self.behind == "norm per head":
            q, k = self.norm_q(q), self.norm_k(k)
        return (rotated(q), rotated(k)) if self.behind == "rope" else (q, k)

    def forward(self, x_btd: Tensor, memory_bsd: Tensor | None = None) -> Tensor:
        memory_bsd = x_btd if memory_bsd is None else memory_bsd
        q, k = self.queries_keys(x_btd, memory_bsd)
        v = self.value(memory_bsd).unflatten(-1, (-1, K)).transpose(1, 2)
        if self.pairing == "interleave":
            k, v = (y.repeat_interleave(H // self.g, dim=1) for y in (k, v))
        if self.pairing == "tiled":
            k, v = (y.repeat(1, H // self.g, 1, 1) for y in (k, v))
        y = SDPA(q, k, v, is_causal=memory_bsd is x_btd, enable_gqa=self.pairing == "native" and self.g != H)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Fused(nn.Module):
    """One matrix, rows (or columns) taken in any order; `split` gives the features of q, k and v heads."""

    def __init__(self, name: str, orders: tuple[list[list[int]], ...], kind: str = "linear") -> None:
        super().__init__()
        self.name, self.orders, self.kind = name, orders, kind
        features = sum(len(heads) * K for heads in orders)
        if kind == "linear":
            self.add_module(name, nn.Linear(D, features))
        else:
            self.register_parameter(name, nn.Parameter(torch.randn(D, features) * 0.2))
        self.out = nn.Linear(H * K, D)

    def project(self, x_btd: Tensor) -> Tensor:
        layer: Any = getattr(self, self.name)
        projected: Tensor
        if self.kind == "linear":
            projected = layer(x_btd)
        elif self.kind == "matmul":
            projected = x_btd @ layer
        else:
            flat = torch.addmm(torch.zeros(layer.shape[1]), x_btd.flatten(0, 1), layer)
            projected = flat.view(*x_btd.shape[:2], -1)
        return projected

    def forward(self, x_btd: Tensor) -> Tensor:
        q, k, v = (by_head(self.project_once(x_btd), heads) for heads in self.orders)
        y = SDPA(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out

    def project_once(self, x_btd: Tensor) -> Tensor:
        if getattr(self, "_cached_for", None) is not x_btd:
            self._cached_for, self._cached = x_btd, self.project(x_btd)
        return self._cached


def in_model(attention: nn.Module) -> nn.Module:
    model = nn.Module()
    model.add_module("attn", attention)
    return model


@dataclass
class Case:
    make: Callable[[], nn.Module]
    kv_heads: int = H
    kv_head: Callable[[int], int] = int
    flags: tuple[str, ...] = ()
    says: str = ""


SEPARATE = {
    "q_proj and k_proj": Case(lambda: Separate(("q_proj", "k_proj")), says="separate q and k"),
    "odd names": Case(lambda: Separate(("a", "b")), says="separate q and k"),
    "enable_gqa": Case(lambda: Separate(("wq", "wk"), 2), 2, lambda head: head // 2, says="key head h // 2"),
    "repeat_interleave": Case(
        lambda: Separate(("wq", "wk"), 2, "interleave"), 2, lambda head: head // 2, says="key head h // 2"
    ),
    "tiled repeat": Case(
        lambda: Separate(("wq", "wk"), 2, "tiled"), 2, lambda head: head % 2, says="key head h mod 2"
    ),
    "one key head": Case(lambda: Separate(("to_q", "to_k"), 1), 1, lambda _: 0),
    "rope": Case(lambda: Separate(("q", "k"), behind="rope"), flags=("rope",)),
    "norm per head": Case(lambda: Separate(("query", "key"), behind="norm per head"), flags=("qk_norm",)),
    "norm over the width": Case(
        lambda: Separate(("query", "key"), behind="norm over the width"), flags=("qk_norm",)
    ),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_separate_projections_are_found_and_each_head_is_measured_right(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = SEPARATE[name]
    attention = case.make()
    model, x = in_model(attention), torch.randn(B, T, D)
    run, recorder = record(model, tmp_path / "run", lambda: attention(x).square().mean())

    site = site_named(recorder, "attn")
    assert (site.heads, site.kv_heads, site.head_dim) == (H, case.kv_heads, K)
    assert (site.verified, site.flags, site.scale) == ("probe", case.flags, None)
    assert case.says in site.layout
    kv_head = [case.kv_head(head) for head in range(H)]
    assert isinstance(attention, Separate)
    wide = attention.double()
    q, k = wide.queries_keys(x.double(), x.double())
    assert_attention(run, "attn", expected_attention(q, k, kv_head, K**-0.5, causal(T)))
    wq, wk = (getattr(attention, part).weight.unflatten(0, (-1, K)) for part in attention.names)
    assert_spectra(run, "attn", list(wq), [wk[g] for g in kv_head])


def interleaved(part: int) -> list[list[int]]:
    return plain_rows(H, part * K, 3 * K)


def grouped(part: str) -> list[list[int]]:
    """Two key heads, each with [q, q, k, v]."""
    if part == "q":
        return [[4 * K * g + K * j + k for k in range(K)] for g in range(2) for j in range(2)]
    return plain_rows(2, (2 if part == "k" else 3) * K, 4 * K)


CONTIGUOUS = (plain_rows(H), plain_rows(H, H * K), plain_rows(H, 2 * H * K))
FUSED = {
    "q, k, v": (Case(lambda: Fused("qkv", CONTIGUOUS), says="rows [q heads; k heads; v heads]"), CONTIGUOUS),
    "q, k, v, odd name": (
        Case(lambda: Fused("p", CONTIGUOUS), says="[q heads; k heads; v heads]"),
        CONTIGUOUS,
    ),
    "per head": (
        Case(
            lambda: Fused("query_key_value", (interleaved(0), interleaved(1), interleaved(2))),
            says="interleaved per head [q, k, v]",
        ),
        (interleaved(0), interleaved(1)),
    ),
    "per key head": (
        Case(
            lambda: Fused("wqkv", (grouped("q"), grouped("k"), grouped("v"))),
            2,
            lambda head: head // 2,
            says="interleaved per key head [q x 2, k, v]",
        ),
        (grouped("q"), grouped("k")),
    ),
    "x @ W": (Case(lambda: Fused("c_attn", CONTIGUOUS, "matmul"), says="columns [q heads"), CONTIGUOUS),
    "addmm": (Case(lambda: Fused("c_attn", CONTIGUOUS, "addmm"), says="columns [q heads"), CONTIGUOUS),
}


@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_are_found_and_each_head_is_measured_right(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case, (q_rows, k_rows, *_) = FUSED[name]
    attention = case.make()
    assert isinstance(attention, Fused)
    x = torch.randn(B, T, D)
    run, recorder = record(in_model(attention), tmp_path / "run", lambda: attention(x).square().mean())

    site = site_named(recorder, "attn")
    assert (site.heads, site.kv_heads, site.head_dim, site.verified) == (H, case.kv_heads, K, "probe")
    assert site.flags == ()
    assert case.says in site.layout
    kv_head = [case.kv_head(head) for head in range(H)]
    y = attention.double().project(x.double()) if attention.kind == "linear" else attention.project(x)
    expected = expected_attention(by_head(y, q_rows), by_head(y, k_rows), kv_head, K**-0.5, causal(T))
    assert_attention(run, "attn", expected)
    layer = getattr(attention, attention.name)
    weight_fd = layer.weight if attention.kind == "linear" else layer.t()
    assert_spectra(run, "attn", [weight_fd[row] for row in q_rows], [weight_fd[k_rows[g]] for g in kv_head])


def test_cross_attention_from_another_width_is_flagged_and_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    attention = Separate(("q_proj", "k_proj"), key_width=10)
    x, memory = torch.randn(B, T, D), torch.randn(B, 5, 10)
    run, recorder = record(
        in_model(attention), tmp_path / "run", lambda: attention(x, memory).square().mean()
    )
    assert site_named(recorder, "attn").flags == ("cross",)
    q, k = attention.double().queries_keys(x.double(), memory.double())
    assert_attention(run, "attn", expected_attention(q, k, range(H), K**-0.5))
    wq, wk = (getattr(attention, name).weight.unflatten(0, (-1, K)) for name in attention.names)
    assert_spectra(run, "attn", list(wq), list(wk))


def test_name_rules_answer_before_the_first_step_and_say_that_nothing_is_verified(tmp_path: Path) -> None:
    model = nn.ModuleDict(
        {
            "separate": Separate(("q_proj", "k_proj")),
            "mha": nn.MultiheadAttention(D, H, kdim=8, vdim=9),
            "odd": Separate(("a", "b")),
        }
    )
    model["separate"].num_heads = H  # type: ignore[assignment]
    with Recorder(model, run_dir=tmp_path / "run") as recorder:
        found = {
            site.name: (site.heads, site.kv_heads, site.head_dim, site.verified) for site in recorder.sites
        }
    assert found == {"separate": (H, H, K, "no"), "mha": (H, H, K, "no")}


def test_a_model_without_any_head_attribute_is_known_after_the_first_step(tmp_path: Path) -> None:
    attention = Fused("p", CONTIGUOUS)
    model, x = in_model(attention), torch.randn(2, T, D)
    with Recorder(model, run_dir=tmp_path / "run", every=1) as recorder:
        assert list(recorder.sites) == []
        attention(x).sum().backward()
        recorder.step()
        assert [(site.name, site.heads, site.verified) for site in recorder.sites] == [("attn", H, "probe")]


def test_a_wrong_suggestion_of_the_names_is_corrected_by_the_probe(tmp_path: Path) -> None:
    """The name says [q; k; v]; the code takes [k; q; v]."""
    torch.manual_seed(1)
    swapped = (plain_rows(H, H * K), plain_rows(H), plain_rows(H, 2 * H * K))
    attention, x = Fused("qkv", swapped), torch.randn(2, T, D)
    attention.num_heads = H  # type: ignore[assignment]
    run, recorder = record(in_model(attention), tmp_path / "run", lambda: attention(x).square().mean())
    assert "order of its own" in site_named(recorder, "attn").layout
    weight = attention.get_parameter("qkv.weight")
    assert_spectra(run, "attn", [weight[r] for r in swapped[0]], [weight[r] for r in swapped[1]])


def test_twins_of_a_probed_layer_are_each_verified_and_measured(tmp_path: Path) -> None:
    torch.manual_seed(2)
    layers = nn.ModuleList(Fused("p", (interleaved(0), interleaved(1), interleaved(2))) for _ in range(3))
    model, x = in_model(layers), torch.randn(2, T, D)

    def loss() -> Tensor:
        h = x
        for layer in layers:
            h = h + layer(h)
        return h.square().mean()

    run, recorder = record(model, tmp_path / "run", loss)
    assert [(site.name, site.verified) for site in recorder.sites] == [
        (f"attn.{i}", "probe") for i in range(3)
    ]
    for index, layer in enumerate(layers):
        weight = layer.get_parameter("p.weight")
        wq, wk = ([weight[row] for row in interleaved(part)] for part in (0, 1))
        assert_spectra(run, f"attn.{index}", wq, wk)


def test_a_projection_without_gradient_keeps_its_entropy_and_says_why_there_is_no_probe(
    tmp_path: Path,
) -> None:
    attention, x = Fused("p", CONTIGUOUS), torch.randn(2, T, D)
    for parameter in attention.get_submodule("p").parameters():
        parameter.requires_grad = False
    run, recorder = record(in_model(attention), tmp_path / "run", lambda: attention(x).square().mean())
    site = site_named(recorder, "attn")
    assert (site.verified, site.query) == ("no", None)
    assert "frozen" in site.reason
    assert len(run.attention()) == H
    assert run.spectra().empty
