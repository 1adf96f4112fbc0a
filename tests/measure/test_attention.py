import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Rows, attention_rows, effective_rank, entropy, least_entropy, singular_values

from diagnostics.errors import DiagnosticsError
from diagnostics.measure.attention import RowStatistics, entropy_lower_bound, observe_rows


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def coins(*shape: int, seed: int = 0, heads: float = 0.6) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < heads


def assert_matches_naive(got: RowStatistics, rows: Rows, tolerance: float, rank_sequences: int = 1) -> None:
    for h in range(got.rows_h.numel()):
        entropies = [value for (_, head, _), value in rows.entropy.items() if head == h]
        assert got.rows_h[h].item() == len(entropies)
        if not entropies:
            assert all(field[h].isnan() for name, field in vars(got).items() if name != "rows_h")
            continue
        assert got.entropy_h[h].item() == pytest.approx(np.mean(entropies), abs=tolerance)
        assert got.entropy_min_h[h].item() == pytest.approx(min(entropies), abs=tolerance)
        fractions = [
            value / np.log(rows.visible[key])
            for key, value in rows.entropy.items()
            if key[1] == h and rows.visible[key] > 1
        ]
        if fractions:
            assert got.entropy_frac_h[h].item() == pytest.approx(np.mean(fractions), abs=tolerance)
        else:
            assert got.entropy_frac_h[h].isnan()
        bounds = [bound(rows.norm[key], rows.visible[key]) for key in rows.entropy if key[1] == h]
        assert got.entropy_bound_h[h].item() == pytest.approx(min(bounds), abs=tolerance)
        assert got.entropy_bound_h[h].item() <= got.entropy_min_h[h].item() + tolerance
        largest = max(value for key, value in rows.largest.items() if key[1] == h)
        assert got.max_logit_h[h].item() == pytest.approx(largest, rel=1e-5, abs=1e-5)
        ranks = []
        for b in range(min(rank_sequences, rows.maps.shape[0])):
            valid = [r for (batch, head, r) in rows.entropy if (batch, head) == (b, h)]
            if valid:
                sigma = singular_values(rows.maps[b, h, valid])
                ranks.append(effective_rank(sigma) / len(valid))
        if ranks:
            assert got.rank_frac_h[h].item() == pytest.approx(np.mean(ranks), rel=1e-3)
        else:
            assert got.rank_frac_h[h].isnan()


def bound(norm: float, keys: int) -> float:
    """Theorem 3.1 as the paper prints it."""
    if keys == 1:
        return 0.0
    beta = np.exp(-norm * np.sqrt(keys / (keys - 1)))
    return float(
        np.log(1 + (keys - 1) * beta) + norm * np.sqrt(keys * (keys - 1)) * beta / (1 + (keys - 1) * beta)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "keys", "channels"),
    [(1, 1, 1, 1, 4), (4, 4, 6, 9, 8), (4, 2, 6, 9, 8), (4, 1, 12, 5, 7), (2, 2, 3, 1, 4)],
    ids=["one-of-each", "plain", "grouped", "one-key-head-more-rows-than-keys", "one-key"],
)
def test_row_statistics_equal_the_naive_ones(
    heads: int, kv_heads: int, rows: int, keys: int, channels: int, dtype: torch.dtype
) -> None:
    q, k = (
        2 * normal(3, heads, rows, channels, dtype=dtype),
        normal(3, kv_heads, keys, channels, seed=1, dtype=dtype),
    )
    got = observe_rows(q, k, scale=channels**-0.5, rank_sequences=2)
    assert got.entropy_h.dtype == torch.float32
    assert got.rows_h.dtype == torch.int32
    # float32 logits of size 10 carry errors near 1e-6.
    assert_matches_naive(got, attention_rows(q, k, scale=channels**-0.5), 1e-5, rank_sequences=2)


@pytest.mark.parametrize(
    "visible",
    [
        torch.ones(6, 9, dtype=torch.bool).tril(3),
        coins(3, 1, 1, 9),
        coins(3, 4, 6, 9),
        coins(1, 4, 6, 1),
        coins(1, 9),
    ],
    ids=["causal", "padding", "everything", "whole-rows", "keys"],
)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("biased", [False, True])
def test_masks_bias_and_softcap_enter_as_in_the_model(
    visible: torch.Tensor,
    softcap: float | None,
    biased: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    q, k = 3 * normal(3, 4, 6, 8), normal(3, 2, 9, 8, seed=1)
    bias = normal(1, 4, 6, 9, seed=2) if biased else None
    got = observe_rows(q, k, scale=0.5, visible=visible, bias=bias, softcap=softcap)
    expected = attention_rows(q, k, scale=0.5, visible=visible, bias=bias, softcap=softcap)
    assert_matches_naive(got, expected, 2e-5)


@pytest.mark.parametrize("low", [-torch.inf, torch.finfo(torch.float32).min, -1e4])
def test_a_bias_as_low_as_masks_are_written_hides_the_key(low: float) -> None:
    q, k = normal(2, 2, 5, 8), normal(2, 2, 7, 8, seed=1)
    seen, bias = coins(2, 1, 5, 7), normal(2, 1, 5, 7, seed=3)
    got = observe_rows(q, k, scale=0.3, bias=torch.where(seen, bias, low))
    assert_matches_naive(got, attention_rows(q, k, scale=0.3, visible=seen, bias=bias), 1e-5)


def test_logits_of_500_and_a_large_common_offset_leave_the_entropy_right() -> None:
    q, k = normal(1, 2, 16, 16), normal(1, 2, 40, 16, seed=1)
    scale = 500 / float((q @ k.mT).abs().max())
    expected = attention_rows(q, k, scale=scale)
    # A float32 logit of 500 is off by up to 3e-5.
    assert_matches_naive(observe_rows(q, k, scale=scale), expected, 2e-4)
    shifted = observe_rows(q, k, scale=1.0, bias=torch.full((1,), 300.0))
    assert_matches_naive(shifted, attention_rows(q, k, scale=1.0, bias=torch.full((1,), 300.0)), 1e-4)


def test_rows_that_see_nothing_are_dropped_and_a_head_of_them_is_unknown() -> None:
    q, k = normal(2, 3, 4, 8), normal(2, 3, 6, 8, seed=1)
    visible = torch.ones(2, 3, 4, 6, dtype=torch.bool)
    visible[:, 1] = False
    visible[0, 2] = False
    visible[1, 2, 3] = False
    got = observe_rows(q, k, scale=1.0, visible=visible)
    assert got.rows_h.tolist() == [8, 0, 3]
    assert_matches_naive(got, attention_rows(q, k, scale=1.0, visible=visible), 1e-5)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_query_or_key_spoils_only_the_rows_it_touches(bad: float) -> None:
    q, k = normal(1, 2, 5, 8), normal(1, 2, 5, 8, seed=1)
    q[0, 0, 2, 3] = bad
    k[0, 1, 4, 0] = bad
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    got = observe_rows(q, k, scale=1.0, visible=causal)
    assert got.rows_h.tolist() == [4, 4]
    assert_matches_naive(got, attention_rows(q, k, scale=1.0, visible=causal), 1e-5)


@pytest.mark.parametrize(("rows", "keys"), [(0, 4), (4, 0)])
def test_nothing_to_observe_is_unknown_not_an_error(rows: int, keys: int) -> None:
    got = observe_rows(normal(2, 3, rows, 8), normal(2, 3, keys, 8), scale=1.0)
    assert got.rows_h.tolist() == [0, 0, 0]
    assert got.entropy_h.isnan().all()
    assert got.rank_frac_h.isnan().all()


def test_rank_tells_the_identity_from_rows_that_all_look_at_one_key() -> None:
    rows = 64
    eye = 30 * torch.eye(rows)[None, None]
    one = torch.zeros(1, 1, rows, rows)
    one[..., 0] = 30.0
    assert observe_rows(eye, torch.eye(rows)[None, None], scale=1.0).rank_frac_h.item() == pytest.approx(
        1.0, rel=1e-5
    )
    collapsed = observe_rows(one, torch.eye(rows)[None, None], scale=1.0)
    assert collapsed.rank_frac_h.item() == pytest.approx(1 / rows, rel=1e-5)
    assert collapsed.entropy_h.item() < 1e-9


def test_autocast_does_not_round_the_logits() -> None:
    q, k = normal(1, 2, 8, 8), normal(1, 2, 8, 8, seed=1)
    plain = observe_rows(q, k, scale=4.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = observe_rows(q, k, scale=4.0)
    assert torch.equal(plain.entropy_h, mixed.entropy_h)


def test_inputs_and_the_random_state_are_left_as_they_were() -> None:
    q, k, bias = normal(1, 2, 8, 8).requires_grad_(), normal(1, 2, 8, 8, seed=1), normal(8, 8, seed=2)
    copies, state = (q.clone(), k.clone(), bias.clone()), torch.get_rng_state()
    got = observe_rows(
        q, k, scale=1.0, bias=bias, visible=torch.ones(8, 8, dtype=torch.bool).tril(), softcap=3.0
    )
    assert all(torch.equal(before, after) for before, after in zip(copies, (q, k, bias), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    assert not got.entropy_h.requires_grad


def test_heads_that_cannot_be_paired_are_refused_in_words() -> None:
    with pytest.raises(DiagnosticsError, match="key heads dividing the heads"):
        observe_rows(normal(1, 3, 4, 8), normal(1, 2, 4, 8), scale=1.0)
    with pytest.raises(DiagnosticsError, match="d_head"):
        observe_rows(normal(1, 2, 4, 8), normal(1, 2, 4, 6), scale=1.0)


@pytest.mark.parametrize(
    ("keys", "norm", "published"),
    [(4, 1.0, 1.226659), (8, 3.0, 0.957457), (8, 6.0, 0.084114), (16, 5.0, 0.490288), (64, 10.0, 0.029206)],
)
def test_the_bound_has_the_published_values_and_is_attained(keys: int, norm: float, published: float) -> None:
    got = entropy_lower_bound(torch.tensor(norm, dtype=torch.float64), torch.tensor(keys)).item()
    assert got == pytest.approx(published, abs=6e-7)
    attained = np.full(keys, -norm / np.sqrt(keys * (keys - 1)))
    attained[0] = norm * np.sqrt((keys - 1) / keys)
    assert entropy(attained) == pytest.approx(got, rel=1e-12)


@pytest.mark.parametrize(("keys", "norm"), [(2, 0.7), (3, 2.0), (5, 3.0), (8, 4.0)])
def test_no_search_finds_a_row_below_the_bound_and_one_reaches_it(keys: int, norm: float) -> None:
    got = entropy_lower_bound(torch.tensor(norm, dtype=torch.float64), torch.tensor(keys)).item()
    assert least_entropy(keys, norm) == pytest.approx(got, rel=1e-5)


@given(st.lists(st.floats(-40, 40), min_size=1, max_size=30), st.floats(-100, 100))
@settings(deadline=None)
def test_no_row_of_logits_is_below_its_bound_whatever_is_added_to_it(
    logits: list[float], shift: float
) -> None:
    row = np.array(logits)
    norm = torch.tensor(np.linalg.norm(row - row.mean()), dtype=torch.float64)
    assert entropy_lower_bound(norm, torch.tensor(row.size)).item() <= entropy(row + shift) + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bound_is_finite_falls_with_the_norm_and_ends_at_log_keys_and_zero(dtype: torch.dtype) -> None:
    norm = torch.tensor([0.0, 1e-3, 1.0, 10.0, 100.0, 1e4, 1e30, torch.inf], dtype=dtype)[:, None]
    keys = torch.tensor([1, 2, 3, 100, 1_000_000])
    got = entropy_lower_bound(norm, keys)
    assert got.isfinite().all()
    assert not got[:, 0].any()
    assert not got[-3:].any()
    np.testing.assert_allclose(got[0].double().numpy(), np.log(keys.numpy()), rtol=1e-6)
    assert bool((got.diff(dim=0) <= 1e-6).all())
    assert entropy_lower_bound(torch.tensor(torch.nan), torch.tensor(4)).isnan()
    assert entropy_lower_bound(torch.tensor(1.0), torch.tensor(0)).isnan()
