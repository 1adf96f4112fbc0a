import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import array, effective_rank, product_singular_values, singular_values

from diagnostics.errors import DiagnosticsError
from diagnostics.measure.spectra import HeadSpectra, head_spectra


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def assert_matches_naive(spectra: HeadSpectra, sigma: np.ndarray, rtol: float = 1e-10) -> None:
    np.testing.assert_allclose(array(spectra.singular_values_hk), sigma, rtol=rtol, atol=1e-14 * sigma.max())
    energy = sigma**2
    np.testing.assert_allclose(array(spectra.sigma1_h), sigma[:, 0], rtol=rtol)
    np.testing.assert_allclose(array(spectra.frobenius_h), np.sqrt(energy.sum(1)), rtol=rtol)
    for count, share in ((1, spectra.sec_1_h), (4, spectra.sec_4_h), (10, spectra.sec_10_h)):
        np.testing.assert_allclose(array(share), energy[:, :count].sum(1) / energy.sum(1), rtol=rtol)
    np.testing.assert_allclose(array(spectra.stable_rank_h), energy.sum(1) / energy[:, 0], rtol=rtol)
    np.testing.assert_allclose(
        array(spectra.effective_rank_h), [effective_rank(row) for row in sigma], rtol=rtol
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows", "wide_q", "wide_k"),
    [
        (1, 1, 8, 32, 32),
        (3, 3, 12, 40, 24),
        (2, 2, 16, 10, 10),
        (2, 2, 16, 10, 40),
        (2, 2, 7, 7, 7),
        (2, 2, 1, 9, 9),
    ],
    ids=["one-head", "cross", "d_head-above-width", "one-side-narrow", "square", "one-row"],
)
def test_spectra_equal_those_of_the_full_product(
    heads: int, kv_heads: int, rows: int, wide_q: int, wide_k: int, dtype: torch.dtype
) -> None:
    wq = normal(heads, rows, wide_q, dtype=dtype)
    wk = normal(kv_heads, rows, wide_k, seed=1, dtype=dtype)
    spectra = head_spectra(wq, wk)
    assert spectra.sigma1_h.dtype == torch.float64
    # Both routes are float64; an ill-conditioned draw loses a few digits in the Gram.
    assert_matches_naive(spectra, product_singular_values(wq, wk, list(range(heads))), rtol=1e-9)


@pytest.mark.parametrize(
    "pairing", [[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]], ids=["grouped", "tiled", "one-key-head"]
)
def test_each_query_head_is_multiplied_with_its_own_key_head(pairing: list[int]) -> None:
    wq, wk = normal(4, 6, 20), normal(2, 6, 20, seed=1)
    spectra = head_spectra(wq, wk, torch.tensor(pairing))
    assert_matches_naive(spectra, product_singular_values(wq, wk, pairing))


def test_a_head_of_rank_one_has_all_its_energy_in_one_direction_and_exact_zeros_behind() -> None:
    wq = normal(1, 6, 1) @ normal(1, 1, 20, seed=1)
    spectra = head_spectra(wq, normal(1, 6, 20, seed=2))
    assert spectra.sec_1_h.item() == pytest.approx(1.0, abs=1e-12)
    # The float32 outer product is of rank 1 only up to 1e-7 of its own rounding.
    assert spectra.effective_rank_h.item() == pytest.approx(1.0, abs=1e-4)
    exact = torch.zeros(1, 6, 20)
    exact[0, 2, 3] = 1.5
    spectra = head_spectra(exact, normal(1, 6, 20, seed=2))
    assert spectra.singular_values_hk[0, 1:].tolist() == [0.0] * 5
    assert spectra.sigma1_h.item() == pytest.approx(
        1.5 * normal(1, 6, 20, seed=2)[0, 2].double().norm().item(), rel=1e-12
    )


def test_a_head_of_rank_two_has_two_singular_values_and_no_rounding_noise_behind() -> None:
    wq = normal(1, 12, 2, dtype=torch.float64) @ normal(1, 2, 40, seed=1, dtype=torch.float64)
    spectra = head_spectra(wq, normal(1, 12, 40, seed=2))
    assert (spectra.singular_values_hk > 0).sum().item() == 2


def test_small_singular_values_of_a_decayed_head_are_right_to_float32() -> None:
    # Singular values of Wq and Wk from 1 down to 1e-7: the condition of the product is up to 1e14, that of the Gram too.
    rows, width = 16, 64
    decay = torch.logspace(0, -7, rows, dtype=torch.float64)

    def decayed(seed: int) -> torch.Tensor:
        left = torch.linalg.qr(normal(rows, rows, seed=seed, dtype=torch.float64)).Q
        right = torch.linalg.qr(normal(width, rows, seed=seed + 1, dtype=torch.float64)).Q
        decayed_kd: torch.Tensor = (left * decay) @ right.T
        return decayed_kd[None]

    wq, wk = decayed(0), decayed(10)
    got = array(head_spectra(wq, wk).singular_values_hk)[0]
    # Oracle without Grams: QR of both factors, whose errors are 1e-16 of the norms (both are 1 here).
    r_q, r_k = (np.asarray(np.linalg.qr(array(w)[0].T, mode="r")) for w in (wq, wk))
    expected = singular_values(r_q @ r_k.T)
    np.testing.assert_allclose(got, expected, rtol=6e-8, atol=2e-15)


def test_a_zero_product_has_norm_zero_and_undefined_shares() -> None:
    for wq in (torch.zeros(1, 4, 12), torch.zeros(1, 4, 3)):
        spectra = head_spectra(wq, normal(1, 4, 12))
        assert spectra.sigma1_h.tolist() == spectra.frobenius_h.tolist() == [0.0]
        assert not spectra.singular_values_hk.any()
        for undefined in (
            spectra.sec_1_h,
            spectra.sec_4_h,
            spectra.sec_10_h,
            spectra.stable_rank_h,
            spectra.effective_rank_h,
        ):
            assert undefined.isnan().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width", [20, 5])
def test_a_non_finite_weight_makes_its_own_head_unknown_and_no_other(bad: float, width: int) -> None:
    wq, wk = normal(3, 8, width), normal(3, 8, width, seed=1)
    wq[1, 3, 2] = bad
    spectra = head_spectra(wq, wk)
    sigma = product_singular_values(wq[[0, 2]], wk[[0, 2]], [0, 1])
    np.testing.assert_allclose(array(spectra.singular_values_hk)[[0, 2]], sigma, rtol=1e-9)
    for field in vars(spectra).values():
        assert field[1].isnan().all()
        assert field[[0, 2]].isfinite().all()


def test_a_non_finite_key_head_makes_every_query_head_paired_with_it_unknown() -> None:
    wq, wk = normal(4, 5, 20), normal(2, 5, 20, seed=1)
    wk[0, 0, 0] = torch.nan
    assert head_spectra(wq, wk, torch.tensor([0, 0, 1, 1])).sigma1_h.isnan().tolist() == [
        True,
        True,
        False,
        False,
    ]


@given(
    rows=st.integers(1, 9), wide_q=st.integers(1, 14), wide_k=st.integers(1, 14), rank=st.integers(0, 5), seed=st.integers(0, 99),
    scale=st.sampled_from([1e-20, 1e-3, 1.0, 1e10]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_shares_stay_in_order_and_sigma1_is_right_for_any_shape_rank_and_scale(
    rows: int, wide_q: int, wide_k: int, rank: int, seed: int, scale: float
) -> None:
    wq = (
        scale
        * normal(2, rows, rank, seed=seed, dtype=torch.float64)
        @ normal(2, rank, wide_q, seed=seed + 1, dtype=torch.float64)
    )
    wk = normal(2, rows, wide_k, seed=seed + 2, dtype=torch.float64)
    spectra = head_spectra(wq, wk)
    sigma = product_singular_values(wq, wk, [0, 1])
    # Absolute against the factors' norms: their product can be nearly zero though they are not.
    scale_of_noise = float(wq.norm() * wk.norm())
    np.testing.assert_allclose(
        array(spectra.singular_values_hk), sigma, atol=1e-13 * scale_of_noise + 1e-300, rtol=1e-7
    )
    if rank:
        assert bool((spectra.sec_1_h <= spectra.sec_4_h).all())
        assert bool((spectra.sec_4_h <= spectra.sec_10_h).all())
        assert bool((spectra.sec_10_h <= 1 + 1e-12).all())
        assert bool((spectra.stable_rank_h <= min(rank, rows, wide_q, wide_k) + 1e-9).all())


def test_autocast_changes_nothing_and_no_graph_is_built() -> None:
    wq, wk = normal(2, 8, 24).requires_grad_(), normal(2, 8, 24, seed=1)
    plain = head_spectra(wq, wk)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = head_spectra(wq, wk)
    assert torch.equal(plain.singular_values_hk, mixed.singular_values_hk)
    assert not plain.sigma1_h.requires_grad


@pytest.mark.parametrize(
    ("shapes", "pairing", "says"),
    [
        (((2, 4, 8), (1, 4, 8)), None, "pass kv_head_h"),
        (((2, 4, 8), (2, 5, 8)), None, "same d_head"),
        (((2, 4, 8), (1, 4, 8)), [0, 1], "from 0 to 0"),
        (((2, 4, 8), (1, 4, 8)), [0], "2 numbers"),
        (((2, 4), (2, 4)), None, "split the weights by head"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_in_words(
    shapes: tuple[tuple[int, ...], tuple[int, ...]], pairing: list[int] | None, says: str
) -> None:
    with pytest.raises(DiagnosticsError, match=says):
        head_spectra(
            torch.ones(shapes[0]), torch.ones(shapes[1]), None if pairing is None else torch.tensor(pairing)
        )
