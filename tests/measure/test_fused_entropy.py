import numpy as np
import pytest
import torch
from oracle import attention_rows

from diagnostics.errors import DiagnosticsError
from diagnostics.measure import fused_entropy
from diagnostics.measure.fused_entropy import FusedEntropy, attention_entropy, blockwise_attention


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coins(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(7)) < 0.6


def assert_matches_naive(
    got: FusedEntropy,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    visible: torch.Tensor | None,
    tolerance: float,
) -> None:
    rows = attention_rows(q, k, scale=scale, visible=visible)
    assert got.entropy_bht.dtype == got.lse_bht.dtype == torch.float32
    for key in np.ndindex(*q.shape[:3]):
        if key not in rows.entropy:
            assert got.entropy_bht[key].isnan()
            assert got.lse_bht[key].isnan()
            continue
        assert got.entropy_bht[key].item() == pytest.approx(rows.entropy[key], abs=tolerance)
        # The largest weight is exp(largest logit - lse), which gives the log-sum-exp independently.
        lse = rows.largest[key] - np.log(rows.maps[key].max())
        assert got.lse_bht[key].item() == pytest.approx(lse, abs=tolerance, rel=1e-6)


@pytest.fixture(params=["kernel", "blockwise"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs on the CPU kernel and on the route for devices without one, in blocks of a few rows."""
    if request.param == "blockwise":
        monkeypatch.setattr(fused_entropy, "BLOCK_LOGITS", 100)

        def attend(
            q: torch.Tensor, k: torch.Tensor, scale: float, hidden: torch.Tensor | None, *, is_causal: bool
        ) -> object:
            additive = None if hidden is None else torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
            return blockwise_attention(q, k, scale, additive, is_causal=is_causal)

        monkeypatch.setattr(fused_entropy, "_attend", attend)
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "keys", "channels"),
    [(1, 1, 1, 1, 8), (4, 2, 7, 7, 5), (3, 1, 5, 11, 16), (2, 2, 40, 3, 1), (2, 2, 9, 1, 12)],
    ids=["one-of-each", "grouped-odd-d_head", "one-key-head", "one-channel", "one-key"],
)
@pytest.mark.parametrize("is_causal", [False, True])
def test_entropy_of_every_row_equals_the_naive_one(
    route: str, heads: int, kv_heads: int, rows: int, keys: int, channels: int, is_causal: bool, dtype: torch.dtype  # noqa: FBT001 - a parameter of the test
) -> None:  # fmt: skip
    q, k = (
        2 * normal(2, heads, rows, channels, dtype=dtype),
        normal(2, kv_heads, keys, channels, seed=1, dtype=dtype),
    )
    visible = torch.ones(rows, keys, dtype=torch.bool).tril() if is_causal else None
    got = attention_entropy(q, k, is_causal=is_causal)
    assert_matches_naive(got, q, k, channels**-0.5, visible, 1e-5)


@pytest.mark.parametrize("shape", [(6, 9), (1, 9), (9,), (2, 1, 1, 9), (2, 4, 6, 9), (1, 4, 6, 1)])
@pytest.mark.parametrize("low", [None, -torch.inf, torch.finfo(torch.float32).min, -1e4])
def test_bool_and_float_masks_of_any_broadcastable_shape(
    route: str, shape: tuple[int, ...], low: float | None
) -> None:
    q, k, visible = normal(2, 4, 6, 8), normal(2, 2, 9, 8, seed=1), coins(*shape)
    mask = visible if low is None else torch.where(visible, 0.0, low)
    assert_matches_naive(attention_entropy(q, k, scale=0.7, attn_mask=mask), q, k, 0.7, visible, 1e-5)


def test_fully_masked_rows_are_unknown(route: str) -> None:
    q, k = normal(1, 2, 3, 8), normal(1, 2, 5, 8, seed=1)
    visible = torch.ones(1, 1, 3, 5, dtype=torch.bool)
    visible[..., 1, :] = False
    got = attention_entropy(q, k, attn_mask=visible)
    assert got.entropy_bht.isnan().all(1).tolist() == [[False, True, False]]


def test_logits_of_500_and_keys_with_a_large_common_part(route: str) -> None:
    q, k = normal(1, 2, 30, 16), normal(1, 2, 30, 16, seed=1)
    scale = 500 / float((q @ k.mT).abs().max())
    visible = torch.ones(30, 30, dtype=torch.bool).tril()
    # 3e-7 of the largest logit is the kernel's float32 error.
    assert_matches_naive(attention_entropy(q, k, scale=scale, is_causal=True), q, k, scale, visible, 3e-4)
    # Logits of hundreds that differ by units: 3e-6 here, 2e-4 if the keys were not centred.
    far = k + 64 * normal(1, 2, 1, 16, seed=3)
    got = attention_entropy(q, far, scale=1.0, is_causal=True)
    assert_matches_naive(got, q, far, 1.0, visible, 2e-5)


def test_entropy_is_never_negative(route: str) -> None:
    got = attention_entropy(200 * torch.eye(8)[None, None], torch.eye(8)[None, None])
    assert bool((got.entropy_bht >= 0).all())
    assert bool((got.entropy_bht < 1e-4).all())


def test_long_rows_agree_with_float64_softmax() -> None:
    q, k = normal(1, 1, 700, 32), normal(1, 1, 700, 32, seed=1)
    got = attention_entropy(q, k, is_causal=True).entropy_bht.double()
    logits = (q.double() @ k.double().mT / 32**0.5).masked_fill(torch.ones(700, 700).triu(1) > 0, -torch.inf)
    expected = torch.special.entr(logits.softmax(-1)).sum(-1)
    assert (got - expected).abs().max().item() < 5e-6


@pytest.mark.parametrize(("rows", "keys"), [(0, 4), (4, 0)])
def test_nothing_to_attend_to_is_unknown(rows: int, keys: int) -> None:
    got = attention_entropy(normal(2, 3, rows, 8), normal(2, 3, keys, 8))
    assert got.entropy_bht.shape == (2, 3, rows)
    assert got.entropy_bht.isnan().all()


def test_transposed_and_sliced_inputs_as_models_hand_them_over() -> None:
    qkv = normal(2, 10, 3, 4, 8)
    q, k = qkv[:, :, 0].transpose(1, 2), qkv[:, :, 1].transpose(1, 2)
    got = attention_entropy(q, k, is_causal=True)
    assert_matches_naive(got, q, k, 8**-0.5, torch.ones(10, 10, dtype=torch.bool).tril(), 1e-5)
    strided = normal(2, 4, 8, 10).mT
    assert_matches_naive(attention_entropy(strided, strided), strided, strided, 8**-0.5, None, 1e-5)


def test_a_real_bias_is_refused_with_the_function_that_can() -> None:
    q = normal(1, 2, 4, 8)
    with pytest.raises(DiagnosticsError, match="observe_rows"):
        attention_entropy(q, q, attn_mask=normal(4, 4))
    with pytest.raises(DiagnosticsError, match="is_causal"):
        attention_entropy(q, q, attn_mask=coins(4, 4), is_causal=True)
    with pytest.raises(DiagnosticsError, match="key heads dividing"):
        attention_entropy(normal(1, 3, 4, 8), q)


def test_autocast_changes_nothing_no_graph_is_built_and_no_random_number_is_drawn() -> None:
    q, k, state = normal(1, 2, 8, 8).requires_grad_(), normal(1, 2, 8, 8, seed=1), torch.get_rng_state()
    plain = attention_entropy(q, k, scale=4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attention_entropy(q, k, scale=4.0)
    assert torch.equal(plain.entropy_bht, mixed.entropy_bht)
    assert not plain.entropy_bht.requires_grad
    assert torch.equal(state, torch.get_rng_state())
