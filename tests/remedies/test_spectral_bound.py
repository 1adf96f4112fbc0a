"""No selected matrix moves by more than tau of its largest singular value, and nothing else moves otherwise."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_models import Small, batch
from torch import Tensor, nn

from diagnostics.attach.rules import candidate_sites
from diagnostics.record.recorder import Recorder
from diagnostics.remedies.spectral_bound import SpectralBound, active_bounds, default_floor

Optimizer = torch.optim.Optimizer
TAU = 0.01
SLACK = 1 + 1e-3


def sigma1(matrix: Tensor) -> float:
    wide = matrix.detach().double().reshape(matrix.shape[0], -1).numpy()
    return float(np.linalg.svd(wide, compute_uv=False)[0])


def bounded_steps(
    optimizer: Optimizer,
    loss: Callable[[int], Tensor],
    parts: Callable[[], dict[str, Tensor]],
    steps: int = 5,
) -> list[dict[str, tuple[float, float]]]:
    """sigma1 of each named part before each step, and of its change."""
    history = []
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        before = {name: part.detach().clone() for name, part in parts().items()}
        optimizer.step()
        after = parts()
        history.append(
            {name: (sigma1(old), sigma1(after[name].detach() - old)) for name, old in before.items()}
        )
    return history


def assert_bounded(
    history: list[dict[str, tuple[float, float]]], shapes: dict[str, Tensor], tau: float = TAU
) -> None:
    for step in history:
        for name, (weight, update) in step.items():
            floor = default_floor(shapes[name].shape[0], shapes[name][0].numel())
            assert update <= tau * max(weight, floor) * SLACK, name


def small_loss(model: nn.Module) -> Callable[[int], Tensor]:
    return lambda step: model(batch(step)).square().mean()


def matrices_of(model: nn.Module) -> dict[str, Tensor]:
    """The matrices that are bounded as a whole in `Small`, and the blocks of its two fused projections."""
    parts: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2 or name == "embed.weight":
            continue
        if "c_attn" in name or "in_proj" in name:
            parts |= {f"{name}[{index}]": block for index, block in enumerate(torch.split(parameter, 16))}
        else:
            parts[name] = parameter
    return parts


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=30.0, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_step_changes_a_matrix_by_more_than_tau(name: str) -> None:
    torch.manual_seed(0)
    model = Small()
    # The embedding is not bounded, and at these rates runs away.
    optimizer = OPTIMIZERS[name]([p for n, p in model.named_parameters() if n != "embed.weight"])
    with SpectralBound(optimizer, TAU) as bound:
        history = bounded_steps(optimizer, small_loss(model), lambda: matrices_of(model))
    assert_bounded(history, matrices_of(model))
    # The bound is met, not undershot: where it fires, the step is as large as allowed.
    weight, update = history[0]["layers.0.c_attn.weight[0]"]
    assert update == pytest.approx(TAU * max(weight, default_floor(16, 16)), rel=2e-3)
    assert bound.summary()["smallest_scale"] < 1.0
    assert 0.0 < bound.summary()["fired_share"] <= 1.0


def test_muon_is_bounded_too() -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.Muon(
        [p for n, p in model.named_parameters() if p.ndim == 2 and n != "embed.weight"], lr=1.0
    )
    with SpectralBound(optimizer, TAU):
        history = bounded_steps(optimizer, small_loss(model), lambda: matrices_of(model))
    assert_bounded(history, matrices_of(model))


def test_a_step_inside_a_closure_is_bounded_from_the_first_on() -> None:
    """There are no gradients yet when the optimizer is called."""
    torch.manual_seed(0)
    model = Small().eval()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch(0)).square().mean() * 100
        loss.backward()
        return loss

    with SpectralBound(optimizer, TAU) as bound:
        before = {name: part.detach().clone() for name, part in matrices_of(model).items()}
        optimizer.step(closure)
        after = matrices_of(model)
    assert bound.summary()["steps"] == 1
    assert bound.summary()["smallest_scale"] < 1.0
    changes = {name: (sigma1(old), sigma1(after[name].detach() - old)) for name, old in before.items()}
    assert_bounded([changes], before)


def test_a_step_within_the_bound_keeps_its_bits_and_one_outside_takes_no_other_matrix_along() -> None:
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(6, 4))]
    twins = [nn.Parameter(w.detach().clone()) for w in weights]
    optimizers = [torch.optim.SGD(ws, lr=1.0) for ws in (weights, twins)]
    bound = SpectralBound(optimizers[0], TAU)
    for ws in (weights, twins):
        ws[0].grad = 1e-4 * torch.ones(6, 4)
        ws[1].grad = torch.ones(6, 4)
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(weights[0], twins[0])
    assert not torch.equal(weights[1], twins[1])
    scales = [bound.scale_of(w) for w in weights]
    assert scales[0] is not None
    assert scales[0].item() == 1.0
    assert scales[1] is not None
    assert 0.0 < scales[1].item() < 1.0
    assert bound.scale_of(nn.Parameter(torch.ones(2, 2))) is None


def test_vectors_embeddings_and_a_tied_head_are_left_alone() -> None:
    torch.manual_seed(0)
    model = Small()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, twin)]
    bound = SpectralBound(optimizers[0], 1e-4)
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        torch.manual_seed(1)
        small_loss(m)(0).backward()
        optimizer.step()
    plain = dict(twin.named_parameters())
    assert model.head.weight is model.embed.weight
    for name, parameter in model.named_parameters():
        free = parameter.ndim < 2 or name == "embed.weight"
        assert torch.equal(parameter, plain[name]) == free, name
    assert bound.scale_of(model.get_parameter("embed.weight")) is None


def test_convolutions_are_bounded_as_flattened_matrices() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3)
    optimizer = torch.optim.SGD(conv.parameters(), lr=5.0)
    x = torch.randn(2, 3, 8, 8)
    with SpectralBound(optimizer, TAU) as bound:
        history = bounded_steps(optimizer, lambda _: conv(x).square().mean(), lambda: {"w": conv.weight})
    assert bound.matrices == 1
    assert_bounded(history, {"w": conv.weight})


@pytest.mark.parametrize("floor", [None, 0.5])
def test_a_zero_matrix_moves_and_grows(floor: float | None) -> None:
    weight = nn.Parameter(torch.zeros(6, 4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    direction = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with SpectralBound(optimizer, TAU, floor=floor):
        sizes = []
        for _ in range(400):
            weight.grad = direction.clone()
            optimizer.step()
            sizes.append(sigma1(weight))
    least = 0.01 * (math.sqrt(6) + 2.0) if floor is None else floor
    assert sizes[0] == pytest.approx(TAU * least, rel=2e-3)
    assert sizes[99] == pytest.approx(least, rel=0.05)
    # Beyond the floor each step may add a share of the weight itself: e^(0.01 * 300) in 300 steps.
    assert sizes[399] == pytest.approx(least * math.exp(3.0), rel=0.1)


def conv1d(width: int) -> nn.Module:
    """GPT-2's transposed linear layer, which its own class name tells."""

    class Conv1D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(width, 3 * width) * 0.02)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.c_attn = 2, Conv1D()

        def forward(self, x_btd: Tensor) -> Tensor:
            q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.c_attn(x_btd).chunk(3, -1))
            return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    return Attention()


@pytest.mark.parametrize("by_sites", [False, True])
@pytest.mark.parametrize("kind", ["mha", "linear", "transposed"])
def test_each_block_of_a_fused_projection_has_its_own_bound(kind: str, by_sites: bool) -> None:  # noqa: FBT001 - a parameter
    """The value block is made a hundred times larger: a bound of the whole would let q and k go."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 16)
    if kind == "transposed":
        model = conv1d(16)
        weight = model.get_parameter("c_attn.weight")
    else:
        model = nn.MultiheadAttention(16, 2, batch_first=True) if kind == "mha" else Small().layers[0]
        weight = model.get_parameter("in_proj_weight" if kind == "mha" else "c_attn.weight")
    dim = 1 if kind == "transposed" else 0
    with torch.no_grad():
        weight.narrow(dim, 32, 16).mul_(100)
    optimizer = torch.optim.AdamW([weight], lr=0.3)
    bound = (
        SpectralBound.for_sites(optimizer, TAU, model, candidate_sites(model))
        if by_sites
        else SpectralBound(optimizer, TAU)
    )

    def loss(_: int) -> Tensor:
        return (model(x, x, x)[0] if kind == "mha" else model(x)).square().mean()  # type: ignore[no-any-return]

    def parts() -> dict[str, Tensor]:
        return dict(zip("qkv", torch.split(weight, 16, dim=dim), strict=True))

    history = bounded_steps(optimizer, loss, parts)
    assert bound.matrices == 3
    assert_bounded(history, parts())


def test_select_takes_a_module_parameters_or_a_callable() -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layer = model.get_submodule("layers.1.linear1")
    assert isinstance(layer, nn.Linear)
    forms: list[Any] = [
        layer,
        [layer.weight],
        iter([layer.weight, layer.weight]),
        layer.weight,
        lambda p: p is layer.weight,
    ]
    for form in forms:
        bound = SpectralBound(optimizer, TAU, select=form)
        assert [p is layer.weight for p in bound._parameters] == [True]
        bound.remove()
    with SpectralBound(optimizer, TAU, select=[model.get_parameter("embed.weight")]) as bound:
        assert bound.matrices == 1  # an embedding, as asked


def test_what_select_cannot_mean_is_refused_in_words() -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrong: list[tuple[Any, str]] = [
        ([nn.Parameter(torch.ones(2, 2))], r"a parameter of shape \(2, 2\) that the optimizer does not hold"),
        ([model.layers[1].norm1.weight], "a vector has no largest singular value"),  # type: ignore[union-attr]
        (lambda _: False, "select leaves no matrix to bound"),
        (nn.Linear(2, 2), "select leaves no matrix to bound"),
        (["embed.weight"], "select holds 'embed.weight'; give parameters"),
        (3, "select is 3; give parameters"),
    ]
    for select, message in wrong:
        with pytest.raises(ValueError, match=message):
            SpectralBound(optimizer, TAU, select=select)
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("tau", [0, -1.0, float("nan"), "0.1", True, None])
def test_a_tau_out_of_range_is_refused_with_its_value(tau: Any) -> None:
    optimizer = torch.optim.SGD(Small().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"tau is {tau!r}, it must be a number above 0"):
        SpectralBound(optimizer, tau)
    with SpectralBound(optimizer, 0.1) as bound:
        with pytest.raises(ValueError, match="tau is"):
            bound.tau = tau
        assert bound.tau == 0.1


@pytest.mark.parametrize("floor", [-1.0, float("nan"), float("inf"), "1"])
def test_a_floor_out_of_range_is_refused_with_its_value(floor: Any) -> None:
    optimizer = torch.optim.SGD(Small().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"floor is {floor!r}, it must be a finite number"):
        SpectralBound(optimizer, TAU, floor=floor)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer is a Small, it must be a torch\.optim\.Optimizer"):
        SpectralBound(Small(), TAU)  # type: ignore[arg-type]


def test_removing_and_leaving_the_block_take_every_hook_off() -> None:
    optimizer = torch.optim.SGD(Small().parameters(), lr=0.1)
    with SpectralBound(optimizer, TAU) as first, SpectralBound(optimizer, 2 * TAU) as second:
        assert active_bounds(optimizer) == (first, second)
        assert len(optimizer._optimizer_step_pre_hooks) == 2
    first.remove()
    assert active_bounds(optimizer) == ()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_of_several_bounds_the_tightest_holds() -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with SpectralBound(optimizer, 10 * TAU), SpectralBound(optimizer, TAU):
        history = bounded_steps(optimizer, small_loss(model), lambda: matrices_of(model), steps=3)
    assert_bounded(history, matrices_of(model))


def test_a_bound_continues_from_its_state_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = Small().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    bound = SpectralBound(optimizer, TAU)
    bounded_steps(optimizer, small_loss(model), dict, steps=3)
    twin = copy.deepcopy(model)
    twin_optimizer = torch.optim.AdamW(twin.parameters(), lr=0.05)
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch itself would share it
    other = SpectralBound(twin_optimizer, 0.5)
    other.load_state_dict(bound.state_dict())
    assert other.tau == TAU
    assert other.summary() == bound.summary()
    for m, o in ((model, optimizer), (twin, twin_optimizer)):
        bounded_steps(o, small_loss(m), dict, steps=2)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)
    assert other.summary() == bound.summary()


def test_a_state_of_other_matrices_gives_its_tau_and_no_vectors() -> None:
    donor = SpectralBound(torch.optim.SGD([nn.Parameter(torch.ones(3, 5))], lr=0.1), TAU)
    weight = nn.Parameter(torch.ones(7, 2))
    optimizer = torch.optim.SGD([weight], lr=10.0)
    bound = SpectralBound(optimizer, 0.5)
    bound.load_state_dict(donor.state_dict())
    weight.grad = torch.ones(7, 2)
    optimizer.step()
    assert bound.tau == TAU
    assert sigma1(weight.detach() - 1.0) <= TAU * math.sqrt(14) * SLACK


def test_gradients_that_are_nan_or_infinite_raise_nothing_and_stay_what_they_are() -> None:
    torch.manual_seed(0)
    for bad in (float("nan"), float("inf")):
        good, poor = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4))
        before = good.detach().clone()
        optimizer = torch.optim.SGD([good, poor], lr=1.0)
        with SpectralBound(optimizer, TAU):
            good.grad, poor.grad = torch.ones(4, 4), torch.full((4, 4), bad)
            optimizer.step()
        assert not poor.isfinite().any()
        assert sigma1(good.detach() - before) <= TAU * max(sigma1(before), default_floor(4, 4)) * SLACK


def test_parameters_without_gradients_and_of_other_dtypes_are_no_obstacle() -> None:
    torch.manual_seed(0)
    weights = [
        nn.Parameter(torch.randn(4, 4, dtype=d)) for d in (torch.float32, torch.float64, torch.bfloat16)
    ]
    idle = nn.Parameter(torch.randn(4, 4))
    before = [w.detach().clone() for w in (*weights, idle)]
    optimizer = torch.optim.SGD([*weights, idle], lr=1.0)
    with SpectralBound(optimizer, TAU):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(idle, before[3])
    for weight, old in list(zip(weights, before, strict=False))[:2]:
        assert sigma1(weight.detach() - old) <= TAU * sigma1(old) * SLACK
    # Stored in 8 bits of mantissa, a step of 1 % is rounded by up to 2^-9 of each entry.
    half = sigma1(weights[2].detach().double() - before[2].double())
    assert half <= TAU * sigma1(before[2]) + 2**-8 * float(before[2].double().norm())


def test_a_recorder_leaves_a_users_own_bound_armed(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with SpectralBound(optimizer, TAU) as bound:
        Recorder(model, optimizer, tmp_path / "run").close()
        assert active_bounds(optimizer) == (bound,)
        assert len(optimizer._optimizer_step_post_hooks) == 1
