"""The candidate signals of the corpus against dense matrices in numpy."""

import copy
import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

torch.set_num_threads(1)

WIDTH, HEADS, KEY_HEADS, HEAD_DIM = 24, 4, 2, 6


def _loaded() -> ModuleType:
    path = Path(__file__).parents[2] / "sample_runs" / "corpus" / "candidates.py"
    spec = importlib.util.spec_from_file_location("corpus_candidates", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


candidates = _loaded()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim = HEAD_DIM
        self.q_proj = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias=False)
        self.k_proj = nn.Linear(WIDTH, KEY_HEADS * HEAD_DIM, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        gate_btd = self.k_proj(x_btd).repeat(1, 1, HEADS // KEY_HEADS)
        out_btd: Tensor = x_btd + gate_btd * self.q_proj(x_btd)
        return out_btd


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))
        self.outputs: list[np.ndarray] = []

    def forward(self, x_btd: Tensor) -> Tensor:
        self.outputs = []
        for block in self.blocks:
            x_btd = block(x_btd)
            self.outputs.append(x_btd.detach().double().numpy())
        return x_btd


def weights(model: nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    """Wq_h and Wk_h of every query head, key heads shared by query heads in order."""
    found = []
    for block in model.blocks:  # type: ignore[union-attr]
        q = block.q_proj.weight.detach().double().numpy().copy()
        k = block.k_proj.weight.detach().double().numpy().copy()
        for head in range(HEADS):
            group = head // (HEADS // KEY_HEADS)
            rows, key_rows = (slice(i * HEAD_DIM, (i + 1) * HEAD_DIM) for i in (head, group))
            found.append((q[rows], k[key_rows]))
    return found


def dense_rank(q: np.ndarray, k: np.ndarray, q_now: np.ndarray, k_now: np.ndarray) -> float:
    update = (q_now - q).T @ k + q.T @ (k_now - k)
    energy = np.linalg.svd(update, compute_uv=False) ** 2
    p = energy / energy.sum()
    p = p[p > 0]
    return math.exp(-float(np.sum(p * np.log(p)))) / int(min(2 * q.shape[0], *update.shape))


def x(step: int) -> Tensor:
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(step))


def trained(model: Model, every: int, steps: int, *, measured: bool) -> list[dict[str, float]]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = candidates.Candidates(model, every) if measured else None
    rows = []
    for step in range(steps):
        optimizer.zero_grad()
        model(x(step)).square().mean().backward()
        optimizer.step()
        rows.append({} if found is None else found.measure(step))
    return rows


def test_the_rank_of_the_update_is_that_of_the_dense_matrices_between_two_measured_steps() -> None:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = candidates.Candidates(model, 3)
    kept: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for step in range(7):
        optimizer.zero_grad()
        model(x(step)).square().mean().backward()
        optimizer.step()
        row = found.measure(step)
        if step % 3:
            assert row == {}
            continue
        kept.append(weights(model))
        if step == 0:
            assert set(row) == {"kurtosis"}
            continue
        ranks = [dense_rank(*before, *now) for before, now in zip(kept[-2], kept[-1], strict=True)]
        assert len(ranks) == 2 * HEADS
        assert row["qk_update_rank"] == pytest.approx(np.mean(ranks), rel=1e-9)
        assert row["qk_update_rank_min"] == pytest.approx(min(ranks), rel=1e-9)
        assert 0.0 < row["qk_update_rank_min"] < row["qk_update_rank"] <= 1.0


@pytest.mark.parametrize(("rows", "wide_q", "wide_k"), [(3, 20, 20), (8, 10, 10), (4, 12, 30)])
def test_heads_of_any_shape_have_the_rank_of_their_dense_update(rows: int, wide_q: int, wide_k: int) -> None:
    rng = np.random.default_rng(0)
    q, dq = rng.standard_normal((2, 5, rows, wide_q))
    k, dk = rng.standard_normal((2, 5, rows, wide_k))
    found = candidates.update_rank_n(*map(torch.tensor, (q, k, dq, dk)))
    expected = [dense_rank(q[n], k[n], q[n] + dq[n], k[n] + dk[n]) for n in range(5)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9)


def test_an_update_in_one_direction_has_the_lowest_rank_and_none_has_no_rank() -> None:
    rng = np.random.default_rng(0)
    q, k = (torch.tensor(rng.standard_normal((3, 4, 16))) for _ in range(2))
    dq = torch.zeros_like(q)
    dq[0, 2] = 1.0  # one row alone: the update is an outer product
    k[2, 0, 0] = math.nan
    found = candidates.update_rank_n(q, k, dq, torch.zeros_like(k))
    assert found[0].item() == pytest.approx(1 / 8)
    assert found[1].isnan()
    assert found[2].isnan()


def test_the_kurtosis_is_the_largest_of_the_blocks_in_the_measured_forward() -> None:
    torch.manual_seed(0)
    model = Model()
    found = candidates.Candidates(model, 2)
    for step in range(3):
        model(x(step))
        values = [np.mean((y - y.mean()) ** 4) / y.var() ** 2 for y in model.outputs]
        row = found.measure(step)
        if step % 2:
            assert row == {}
        else:
            assert row["kurtosis"] == pytest.approx(max(values), rel=1e-9)
        assert values[0] != pytest.approx(values[1], rel=1e-3)


def test_what_cannot_be_measured_is_left_out() -> None:
    assert candidates.kurtosis(torch.ones(4, 4)) is None
    assert candidates.kurtosis(torch.tensor([1.0, math.inf])) is None
    assert candidates.kurtosis(torch.tensor([1e30, -1e30, 1e30, -1e30])) == pytest.approx(1.0)
    model = Model()
    found = candidates.Candidates(model, 1)
    model.eval()
    model(x(0))
    assert found.measure(0) == {}
    assert found.measure(1) == {}


def test_training_is_bit_identical_and_nothing_stays_on_the_model_between_measured_steps() -> None:
    torch.manual_seed(0)
    model = Model()
    twin = copy.deepcopy(model)
    trained(model, 2, 6, measured=False)
    state = torch.get_rng_state()
    rows = trained(twin, 2, 6, measured=True)
    assert [bool(row) for row in rows] == [True, False] * 3
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    other = Model()
    watched = candidates.Candidates(other, 2)
    assert all(block._forward_hooks for block in other.blocks)
    watched.measure(0)
    assert not any(block._forward_hooks for block in other.blocks)
    watched.measure(1)
    assert all(block._forward_hooks for block in other.blocks)
