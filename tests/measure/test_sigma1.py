import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import array, singular_values

from diagnostics.errors import DiagnosticsError
from diagnostics.measure.sigma1 import Sigma1, largest_singular_value


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(sigma: torch.Tensor, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    left = torch.linalg.qr(normal(rows, sigma.numel(), seed=seed)).Q
    right = torch.linalg.qr(normal(columns, sigma.numel(), seed=seed + 1)).Q
    matrix: torch.Tensor = (left * sigma) @ right.T
    return matrix


def family(kind: str, rows: int, columns: int) -> torch.Tensor:
    index = torch.arange(1.0, min(rows, columns) + 1)
    if kind == "gauss":
        return normal(rows, columns)
    if kind == "sign":
        return normal(rows, columns).sign()
    if kind == "low-rank-and-noise":
        return normal(rows, columns) + 0.3 * normal(rows, 2, seed=1) @ normal(2, columns, seed=2)
    if kind == "power-law":
        return with_spectrum(1 / index, rows, columns)
    if kind == "near-degenerate":
        sigma = index**-0.5
        sigma[1] = 0.999
        return with_spectrum(sigma, rows, columns)
    assert kind == "flat-edge"
    return with_spectrum(1 - 0.5 * index / index.numel(), rows, columns)


FAMILIES = ["gauss", "sign", "low-rank-and-noise", "power-law", "near-degenerate", "flat-edge"]


def exact(a_bmn: torch.Tensor) -> np.ndarray:
    return np.array([singular_values(matrix)[0] for matrix in array(a_bmn)])


def measured_residual(a_bmn: torch.Tensor, got: Sigma1) -> np.ndarray:
    """From the definition: |A^T u - sigma v| / sigma with u = A v / |A v|."""
    residuals = []
    for matrix, sigma, v in zip(array(a_bmn), array(got.value_b), array(got.vector_bn), strict=True):
        w = matrix @ v
        residuals.append(np.linalg.norm(matrix.T @ w / np.linalg.norm(w) - sigma * v) / sigma)
    return np.array(residuals)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize(("rows", "columns"), [(256, 256), (384, 96), (96, 384), (40, 33), (7, 7)])
def test_a_cold_start_is_right_to_one_part_in_a_thousand(kind: str, rows: int, columns: int) -> None:
    a = family(kind, rows, columns)[None]
    got = largest_singular_value(a)
    assert got.residual_b.item() <= 1e-3
    np.testing.assert_allclose(array(got.value_b), exact(a), rtol=1e-3)
    # The residual is the true one, but for float32 rounding.
    np.testing.assert_allclose(array(got.residual_b), measured_residual(a, got), atol=5e-6)
    assert got.vector_bn.norm(dim=-1).item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("kind", ["gauss", "flat-edge"])
def test_a_cold_start_on_a_large_matrix_is_right_to_one_part_in_a_thousand(kind: str) -> None:
    a = family(kind, 2048, 512)[None]
    # Through the smaller Gram, whose float64 rounding is far below 1e-3; svdvals of the whole takes seconds.
    expected = np.sqrt(np.linalg.eigvalsh(array(a[0]).T @ array(a[0]))[-1])
    assert largest_singular_value(a).value_b.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_matrix_of_a_batch_gets_its_own_value_in_any_dtype(dtype: torch.dtype) -> None:
    a = (normal(5, 30, 40) * torch.tensor([1e-3, 0.1, 1.0, 10.0, 100.0])[:, None, None]).to(dtype)
    got = largest_singular_value(a, tolerance=1e-5)
    assert got.value_b.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    np.testing.assert_allclose(array(got.value_b), exact(a), rtol=1e-6)


def test_a_warm_start_after_a_small_change_needs_two_steps() -> None:
    before = normal(4, 200, 200)
    after = before + 1e-3 * normal(4, 200, 200, seed=1)
    warm = largest_singular_value(after, largest_singular_value(before).vector_bn, steps=2, tolerance=None)
    np.testing.assert_allclose(array(warm.value_b), exact(after), rtol=1e-3)
    cold = largest_singular_value(after, steps=2, tolerance=None)
    assert bool((cold.value_b < 0.95 * warm.value_b).all())


@pytest.mark.parametrize("gap", [1.0, 0.3, 0.1, 0.05])
def test_a_start_that_is_another_singular_vector_does_not_stay_there(gap: float) -> None:
    sigma = torch.linspace(1.0, 0.0, 100)
    sigma[0] = 1 + gap
    sigma[1] = 1.0
    a = with_spectrum(sigma, 100, 100)[None]
    second = torch.linalg.svd(a[0]).Vh[1][None]
    assert largest_singular_value(a, second).value_b.item() == pytest.approx(1 + gap, rel=1e-3)


def test_an_overtaken_start_heals_within_a_few_warm_calls() -> None:
    sigma = torch.linspace(0.95, 0.0, 256)
    sigma[:2] = torch.tensor([1.01, 1.0])
    a = with_spectrum(sigma, 256, 256)[None]
    vector = torch.linalg.svd(a[0]).Vh[1][None]
    for _ in range(5):
        got = largest_singular_value(a, vector)
        assert got.value_b.item() >= 0.999
        vector = got.vector_bn
    assert got.value_b.item() == pytest.approx(1.01, rel=1e-4)


def test_zero_and_non_finite_matrices_concern_only_themselves() -> None:
    a = normal(5, 20, 30)
    a[0] = 0.0
    a[1, 3, 4] = torch.nan
    a[2, 0, 0] = torch.inf
    got = largest_singular_value(a)
    assert (got.value_b[0].item(), got.residual_b[0].item()) == (0.0, 0.0)
    assert got.value_b.isnan().tolist() == [False, True, True, False, False]
    np.testing.assert_allclose(array(got.value_b[3:]), exact(a[3:]), rtol=1e-3)
    # Their vectors may be handed back: the next step's matrices may be sound.
    sound = normal(5, 20, 30, seed=1)
    again = largest_singular_value(sound, got.vector_bn)
    np.testing.assert_allclose(array(again.value_b), exact(sound), rtol=1e-3)


@pytest.mark.parametrize(
    "a",
    [
        torch.eye(50),
        3 * torch.eye(50)[torch.arange(49, -1, -1)],
        torch.diag(torch.tensor([0.0, 2.0, 0.0, 1.0, 0.0, 0.5] + [0.0] * 40)),
        torch.ones(30, 50),
        torch.diag(10.0 ** -torch.arange(36.0)),
        torch.nn.functional.pad(normal(3, 2), (0, 40, 0, 40)),
    ],
    ids=["identity", "permutation", "sparse", "rank-one", "steep", "block"],
)
def test_an_exhausted_krylov_space_adds_no_value_that_is_not_there(a: torch.Tensor) -> None:
    got = largest_singular_value(a[None], tolerance=1e-12)
    np.testing.assert_allclose(array(got.value_b), exact(a[None]), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e25])
def test_tiny_and_huge_matrices_neither_vanish_nor_overflow(scale: float) -> None:
    a = scale * normal(1, 24, 24)
    np.testing.assert_allclose(array(largest_singular_value(a).value_b), exact(a), rtol=1e-3)


@given(
    rows=st.integers(1, 24), columns=st.integers(1, 24), rank=st.integers(1, 6), seed=st.integers(0, 99), steps=st.integers(1, 9)
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_the_estimate_is_never_above_sigma1_and_meets_its_tolerance(
    rows: int, columns: int, rank: int, seed: int, steps: int
) -> None:
    a = normal(2, rows, rank, seed=seed) @ normal(2, rank, columns, seed=seed + 1)
    got = largest_singular_value(a, steps=steps, max_cycles=30)
    np.testing.assert_array_less(array(got.value_b), exact(a) * (1 + 1e-5))
    np.testing.assert_allclose(array(got.value_b), exact(a), rtol=1e-3)
    fixed = largest_singular_value(a, steps=steps, tolerance=None)
    np.testing.assert_array_less(array(fixed.value_b), exact(a) * (1 + 1e-5))


def test_the_cycles_end_at_their_limit_and_the_residual_says_so() -> None:
    got = largest_singular_value(family("flat-edge", 128, 128)[None], tolerance=1e-9, max_cycles=2)
    assert got.residual_b.item() > 1e-4


def test_no_random_number_is_drawn_the_result_repeats_and_the_input_stays() -> None:
    a, state = normal(2, 40, 40), torch.get_rng_state()
    copy = a.clone()
    first, second = largest_singular_value(a.requires_grad_()), largest_singular_value(a)
    assert torch.equal(first.value_b, second.value_b)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a, copy)
    assert not first.value_b.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(first.value_b, largest_singular_value(a).value_b)


def test_an_empty_batch_gives_an_empty_answer() -> None:
    assert largest_singular_value(torch.empty(0, 4, 5)).value_b.shape == (0,)


def test_requests_that_make_no_sense_are_refused_in_words() -> None:
    with pytest.raises(DiagnosticsError, match="batch, rows, columns"):
        largest_singular_value(torch.ones(3, 4))
    with pytest.raises(DiagnosticsError, match="start_bn has shape"):
        largest_singular_value(torch.ones(2, 3, 4), torch.ones(2, 3))
    with pytest.raises(DiagnosticsError, match="steps is 0"):
        largest_singular_value(torch.ones(2, 3, 4), steps=0)
