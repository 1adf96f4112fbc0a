"""Kernels that compute attention out of sight hand in what they know; and how many rows are observed on request."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from live import assert_attention, causal, expected_attention, record, site_named
from torch import Tensor, nn

from diagnostics import Recorder, open_run
from diagnostics.attach.kernels import hand_in
from diagnostics.errors import DiagnosticsError, RecorderWarning

B, T, D, H, K = 2, 6, 8, 2, 4


class Opaque(nn.Module):
    """Attention as a custom kernel would compute it: no function that can be seen from outside."""

    def __init__(self, tell: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.num_heads = H
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.tell = tell

    def forward(self, x_btd: Tensor) -> Tensor:
        q, k, v = (part.view(B, T, H, K).transpose(1, 2) for part in self.qkv(x_btd).chunk(3, -1))
        logits_bhts = (q[:, :, :, None] * k[:, :, None]).sum(-1) / math.sqrt(K)
        weights = torch.exp(logits_bhts - logits_bhts.logsumexp(-1, keepdim=True))
        self.tell(logits_bhts)
        y_bhtk: Tensor = (weights[..., None] * v[:, :, None]).sum(-2)
        return y_bhtk


def entropy(logits_bhts: Tensor) -> Tensor:
    p = logits_bhts.detach().double().softmax(-1)
    return -(p * p.log()).sum(-1)


def test_a_kernel_hands_in_its_own_numbers_and_the_rest_is_null(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def tell(logits_bhts: Tensor) -> None:
        seen.append(logits_bhts.detach())
        lse_bht = logits_bhts.logsumexp(-1)
        mean_bht = (logits_bhts.softmax(-1) * logits_bhts).sum(-1)
        hand_in(lse_bht=lse_bht, mean_logit_bht=mean_bht, max_logit_bht=logits_bhts.amax(-1))

    torch.manual_seed(0)
    model = Opaque(tell)
    x_btd = torch.randn(B, T, D)
    run, recorder = record(model, tmp_path / "run", lambda: model(x_btd).square().sum())
    frame = run.attention()
    logits = seen[0].double()
    assert frame["entropy"].to_numpy() == pytest.approx(entropy(logits).mean((0, 2)).numpy(), rel=1e-5)
    assert frame["entropy_min"].to_numpy() == pytest.approx(entropy(logits).amin((0, 2)).numpy(), rel=1e-5)
    assert frame["max_logit"].to_numpy() == pytest.approx(logits.amax((0, 2, 3)).numpy(), rel=1e-6)
    assert list(frame["rows"]) == [B * T] * H
    assert frame[["entropy_frac", "entropy_bound", "rank_frac"]].isna().all(axis=None)
    site = site_named(recorder, "")
    assert (site.heads, site.verified) == (H, "no"), "names suggest the layout, nothing has checked it"


def test_outside_a_measured_forward_nothing_happens() -> None:
    hand_in(max_logit_bht=torch.zeros(1, 1, 1))
    hand_in()


def test_what_a_kernel_hands_in_wrongly_takes_out_its_site_and_not_the_training(tmp_path: Path) -> None:
    model = Opaque(lambda logits: hand_in(lse_bht=logits.logsumexp(-1)))
    x_btd = torch.randn(B, T, D)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        with pytest.warns(RecorderWarning, match="lse_bht and mean_logit_bht go together"):
            model(x_btd).sum().backward()
        recorder.step()
        model(x_btd).sum().backward()
        recorder.step()
    assert "go together" in recorder.sites.skipped[""]
    assert len(open_run(tmp_path / "run").steps()) == 2


@pytest.mark.parametrize(("asked", "rows"), [("all", 2 * 300), ("300", 2 * 150), ("8", 8), ("", 256)])
def test_as_many_rows_are_observed_as_are_asked_for(
    asked: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIAGNOSTICS_ROWS", asked)
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(D, H, batch_first=True, bias=False)
    x_btd = torch.randn(2, 300, D)
    run, _ = record(mha, tmp_path / "run", lambda: mha(x_btd, x_btd, x_btd, attn_mask=causal(300))[0].sum())
    assert set(run.attention()["rows"]) == {rows}
    if asked == "all":
        q, k = (
            (x_btd @ weight.T).view(2, 300, H, K).transpose(1, 2)
            for weight in mha.in_proj_weight.detach().chunk(3)[:2]
        )
        expected = expected_attention(q, k, range(H), K**-0.5, causal(300))
        expected.pop("rank_frac")  # measured block by block of 256 rows
        assert_attention(run, "", expected)


def test_a_number_of_rows_that_is_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIAGNOSTICS_ROWS", "many")
    mha = nn.MultiheadAttention(D, H)
    x = torch.randn(T, B, D)
    with pytest.raises(DiagnosticsError, match="DIAGNOSTICS_ROWS is 'many'"):
        record(mha, tmp_path / "run", lambda: mha(x, x, x)[0].sum())
