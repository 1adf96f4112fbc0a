"""Attention written out: whatever stands between q k^T and the softmax, its input is what is measured."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from live import assert_attention, assert_spectra, causal, expected_attention, record, site_named
from torch import Tensor, nn
from torch.nn import functional

from diagnostics import Recorder
from diagnostics.errors import RecorderWarning

B, T, D, H, K = 2, 7, 16, 4, 4
Write = Callable[[Tensor, Tensor], Tensor]


class Eager(nn.Module):
    """Odd names on purpose; `write` makes attention weights of q (B, H, T, K) and k (B, G, T, K)."""

    def __init__(self, write: Write, kv_heads: int = H) -> None:
        super().__init__()
        self.alpha = nn.Linear(D, H * K, bias=False)
        self.beta = nn.Linear(D, kv_heads * K, bias=False)
        self.write = write
        self.kv_heads = kv_heads
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x_btd: Tensor) -> Tensor:
        q_bhtk, k_bgtk = self.projected(x_btd)
        attention_bhtt = self.write(q_bhtk, k_bgtk)
        value_bhtk = torch.tanh(x_btd).view(B, T, H, K).transpose(1, 2)
        y_bhtk: Tensor = attention_bhtt @ value_bhtk
        return y_bhtk

    def projected(self, x_btd: Tensor) -> tuple[Tensor, Tensor]:
        q_bhtk = self.alpha(x_btd).view(B, T, H, K).transpose(1, 2)
        k_bgtk = self.beta(x_btd).view(B, T, self.kv_heads, K).transpose(1, 2)
        return q_bhtk, k_bgtk


def matmul(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) / math.sqrt(K)).softmax(dim=-1)


def masked_with_the_lowest_number(q: Tensor, k: Tensor) -> Tensor:
    logits = torch.matmul(q, k.transpose(2, 3)) * K**-0.5
    logits = logits + torch.full((T, T), torch.finfo(logits.dtype).min).triu(1)
    return functional.softmax(logits, dim=-1, dtype=torch.float32)


def masked_fill(q: Tensor, k: Tensor) -> Tensor:
    logits = torch.einsum("bhik,bhjk->bhij", q, k) * K**-0.5
    return torch.softmax(logits.masked_fill(torch.ones(T, T).triu(1).bool(), -1e9), -1)


def flattened_batches(q: Tensor, k: Tensor) -> Tensor:
    logits = torch.baddbmm(
        torch.zeros(1, 1, 1), q.reshape(B * H, T, K), k.reshape(B * H, T, K).mT, beta=0.0, alpha=K**-0.5
    )
    weights: Tensor = nn.Softmax(dim=-1)(logits.view(B, H, T, T))
    return weights


def in_place(q: Tensor, k: Tensor) -> Tensor:
    logits = q @ k.mT
    logits *= K**-0.5
    logits += causal(T)
    weights: Tensor = functional.softmax(logits.float(), dim=-1).type_as(logits)
    return weights


def kept_in_range(q: Tensor, k: Tensor) -> Tensor:
    """The row's maximum taken off first, as some models do: the softmax does not see the true logits."""
    logits = q @ k.mT / math.sqrt(K)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    return functional.softmax(logits, dim=-1)


def scaled_query(q: Tensor, k: Tensor) -> Tensor:
    return functional.softmax((q * K**-0.5) @ k.transpose(-2, -1), dim=-1)


PLAIN = {write.__name__: write for write in (matmul, flattened_batches, kept_in_range, scaled_query)}
CAUSAL = {write.__name__: write for write in (masked_with_the_lowest_number, masked_fill, in_place)}


@pytest.mark.parametrize("name", [*PLAIN, *CAUSAL])
def test_attention_written_out_is_measured_as_the_model_computes_it(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Eager({**PLAIN, **CAUSAL}[name])
    x_btd = torch.randn(B, T, D)
    run, recorder = record(model, tmp_path / "run", lambda: model(x_btd).square().sum())
    site = site_named(recorder, "")
    assert (site.heads, site.kv_heads, site.head_dim, site.verified) == (H, H, K, "probe")
    q_bhtk, k_bhtk = model.projected(x_btd)
    added = causal(T) if name in CAUSAL else None
    assert_attention(run, "", expected_attention(q_bhtk, k_bhtk, range(H), K**-0.5, added))
    assert_spectra(run, "", list(model.alpha.weight.view(H, K, D)), list(model.beta.weight.view(H, K, D)))


def test_one_key_head_broadcast_over_the_query_heads_is_paired_with_all_of_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Eager(matmul, kv_heads=1)
    x_btd = torch.randn(B, T, D)
    run, recorder = record(model, tmp_path / "run", lambda: model(x_btd).square().sum())
    assert (site_named(recorder, "").heads, site_named(recorder, "").kv_heads) == (H, 1)
    q_bhtk, k_bgtk = model.projected(x_btd)
    assert_attention(run, "", expected_attention(q_bhtk, k_bgtk, [0] * H, K**-0.5))
    assert_spectra(run, "", list(model.alpha.weight.view(H, K, D)), list(model.beta.weight.expand(H, K, D)))


@pytest.mark.parametrize(
    ("write", "flag"),
    [
        (lambda q, k: (5.0 * torch.tanh(q @ k.mT / 5.0)).softmax(-1), "softcap"),
        (lambda q, k: (q @ k.mT + torch.arange(T) * 0.5).softmax(-1), "bias"),
        (lambda q, k: torch.cat([q @ k.mT, torch.ones(B, H, T, 1)], dim=-1).softmax(-1)[..., :-1], "sink"),
    ],
    ids=["softcap", "bias", "sink"],
)
def test_what_stands_between_the_product_and_the_softmax_is_flagged_and_measured(
    write: Write, flag: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Eager(write)
    x_btd = torch.randn(B, T, D)
    run, recorder = record(model, tmp_path / "run", lambda: model(x_btd).square().sum())
    assert site_named(recorder, "").flags == (flag,)
    q, k = (x.detach().double() for x in model.projected(x_btd))
    logits_bhts = {
        "softcap": 5.0 * torch.tanh(q @ k.mT / 5.0),
        "bias": q @ k.mT + torch.arange(T) * 0.5,
        "sink": torch.cat([q @ k.mT, torch.ones(B, H, T, 1).double()], dim=-1),
    }[flag]
    p = logits_bhts.softmax(-1)
    entropy_h = -(p * p.log()).sum(-1).mean((0, 2))
    measured = run.attention()
    assert measured["entropy"].to_numpy() == pytest.approx(entropy_h.numpy(), rel=1e-5)
    assert measured["max_logit"].to_numpy() == pytest.approx(logits_bhts.amax((0, 2, 3)).numpy(), rel=1e-5)


def test_a_softmax_that_is_no_attention_is_left_alone(tmp_path: Path) -> None:
    class Router(nn.Module):
        """A mixture's router and a classifier's softmax beside one attention."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = Eager(matmul)
            self.router = nn.Linear(K, 3)

        def forward(self, x_btd: Tensor) -> Tensor:
            y_bhtk = self.attention(x_btd)
            weights = self.router(y_bhtk).softmax(-1)
            mixed: Tensor = (weights[..., :1] * y_bhtk).softmax(-1)
            return mixed

    model = Router()
    x_btd = torch.randn(B, T, D)
    run, recorder = record(model, tmp_path / "run", lambda: model(x_btd).square().sum())
    assert [site.name for site in recorder.sites] == ["attention"]
    assert set(run.attention()["layer"]) == {"attention"}


def test_a_softmax_over_the_queries_is_named_as_unsupported(tmp_path: Path) -> None:
    model = Eager(lambda q, k: (q @ k.mT).softmax(dim=-2))
    x_btd = torch.randn(B, T, D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        with pytest.warns(RecorderWarning, match="runs over dimension -2"):
            model(x_btd).sum().backward()
        recorder.step()
    assert "runs over dimension -2" in next(iter(recorder.sites.skipped.values()))
