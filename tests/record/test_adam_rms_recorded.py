"""The stale second moment signal in the steps table: which optimizers have it, when, and what it is."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from live_models import Small, batch
from live_neutral import STEPS, Optimizer, assert_neutral, assert_same, seeded, trained
from torch import Tensor, nn

from diagnostics.record.recorder import Recorder
from diagnostics.record.second_moments import second_moments
from diagnostics.store.read import open_run

BETA2, EPS = 0.9, 1e-6


class ByHand:
    """v_t of every parameter in float64, and the largest RMS_t, from the gradients that the optimizer was given."""

    def __init__(self, *, amsgrad: bool = False) -> None:
        self._amsgrad = amsgrad
        self._moments: dict[int, np.ndarray] = {}
        self._largest: dict[int, np.ndarray] = {}
        self._steps: dict[int, int] = {}

    def see(self, parameters: list[nn.Parameter]) -> float:
        found = []
        for p in parameters:
            if p.grad is None:
                continue
            g = p.grad.double().numpy()
            v = BETA2 * self._moments.get(id(p), 0.0) + (1 - BETA2) * g**2
            self._moments[id(p)] = v
            self._steps[id(p)] = step = self._steps.get(id(p), 0) + 1
            used = v
            if self._amsgrad:
                used = self._largest[id(p)] = np.maximum(self._largest.get(id(p), 0.0), v)
            ratio = g**2 / np.maximum(used / (1 - BETA2**step), EPS**2)
            found.append(math.sqrt(ratio.mean()))
        return max(found)


def adam(kind: type[Optimizer] = torch.optim.AdamW, **options: Any) -> Callable[[nn.Module], Optimizer]:
    return lambda model: kind(model.parameters(), lr=1e-2, betas=(0.8, BETA2), eps=EPS, **options)  # type: ignore[call-arg]


def column(run_dir: Path) -> list[float]:
    steps = open_run(run_dir).steps()
    return list(steps["adam_rms"]) if "adam_rms" in steps else [math.nan] * len(steps)


def backward(model: nn.Module, step: int) -> Tensor:
    loss: Tensor = model(batch(step)).square().mean() * (30.0 if step == 4 else 1.0)
    model.zero_grad()
    loss.backward()
    return loss


@pytest.mark.parametrize(
    "options",
    [
        {"foreach": False},
        {"foreach": True},
        {"fused": True},
        {"amsgrad": True},
        {"maximize": True},
        {"kind": torch.optim.NAdam},
        {"kind": torch.optim.RAdam},
    ],
    ids=str,
)
def test_it_is_the_papers_rms_of_the_step_at_measured_steps(options: dict[str, Any], tmp_path: Path) -> None:
    seeded()
    model = Small()
    optimizer = adam(**options)(model)
    by_hand = ByHand(amsgrad=options.get("amsgrad", False))
    expected = []
    with Recorder(model, optimizer, tmp_path / "run", every=2) as recorder:
        for step in range(5):
            loss = backward(model, step)
            expected.append(by_hand.see(list(model.parameters())))
            optimizer.step()
            model.zero_grad()
            recorder.step(loss=loss)
    found = column(tmp_path / "run")
    assert found[::2] == pytest.approx(expected[::2], rel=1e-5)
    assert all(map(math.isnan, found[1::2]))
    assert expected[4] > 1.5  # the gradients of that step are 30 times as large
    assert open_run(tmp_path / "run").info["faults"] == []


def test_the_column_explains_itself_in_parts_and_in_the_manifest(tmp_path: Path) -> None:
    assert_neutral(tmp_path, adam())
    (part,) = (tmp_path / "run" / "steps").glob("*.parquet")
    field = pq.read_schema(part).field("adam_rms")
    assert str(field.type) == "double"
    assert b"2304.13013" in field.metadata[b"meaning"]
    metrics = open_run(tmp_path / "run").info["metrics"]["steps"]
    assert metrics["adam_rms"] == {key.decode(): text.decode() for key, text in field.metadata.items()
                                   if key in (b"unit", b"meaning")}  # fmt: skip


@pytest.mark.parametrize(
    "make",
    [
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
        lambda m: torch.optim.Adamax(m.parameters(), lr=0.01),
        lambda m: torch.optim.Adafactor(m.parameters(), lr=0.01),
        lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01),
    ],
    ids=["SGD", "Adamax", "Adafactor", "RMSprop"],
)
def test_an_optimizer_without_this_moment_has_no_value(
    make: Callable[..., Optimizer], tmp_path: Path
) -> None:
    assert_neutral(tmp_path, make)
    assert "adam_rms" not in open_run(tmp_path / "run").steps()


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"amsgrad": True}, {"foreach": True}], ids=str)
def test_training_and_the_optimizers_state_are_bit_identical(options: dict[str, Any], tmp_path: Path) -> None:
    seeded()
    model = Small()
    # A parameter that never gets a gradient: its state stays empty, as it is without a recorder.
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    twin = copy.deepcopy(model)
    plain_optimizer, optimizer = adam(**options)(model), adam(**options)(twin)
    seeded()
    plain = trained(model, plain_optimizer, None)
    seeded()
    with Recorder(twin, optimizer, tmp_path / "run", every=1) as recorder:
        other = trained(twin, optimizer, recorder)
    assert_same(plain, other)
    assert not any(map(math.isnan, column(tmp_path / "run")))
    theirs, mine = plain_optimizer.state_dict()["state"], optimizer.state_dict()["state"]
    assert theirs.keys() == mine.keys()
    for index, state in theirs.items():
        assert state.keys() == mine[index].keys()
        assert all(torch.equal(value, mine[index][name]) for name, value in state.items())


@pytest.mark.parametrize("fused", [False, True])
def test_gradients_that_a_grad_scaler_left_scaled_give_no_value(fused: bool, tmp_path: Path) -> None:  # noqa: FBT001 - a parameter
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    seeded()
    model = Small()
    optimizer = adam(fused=fused)(model)
    by_hand, expected = ByHand(), []
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        for step in range(3):
            optimizer.zero_grad()
            loss: Tensor = model(batch(step)).square().mean()
            scaler.scale(loss).backward()
            if not fused:
                scaler.unscale_(optimizer)
            expected.append(by_hand.see(list(model.parameters())))
            scaler.step(optimizer)
            scaler.update()
            recorder.step(loss=loss)
    run = open_run(tmp_path / "run")
    assert len(run.updates()) > 0
    if fused:
        assert all(map(math.isnan, column(tmp_path / "run")))
    else:
        assert column(tmp_path / "run") == pytest.approx(expected, rel=1e-5)


def test_a_closures_gradients_are_those_it_left(tmp_path: Path) -> None:
    by_hand, expected = ByHand(), []

    def loop(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
        def closure() -> Tensor:
            return backward(model, step)

        loss: Tensor = optimizer.step(closure)  # type: ignore[arg-type, assignment]
        expected.append(by_hand.see(list(model.parameters())))
        return loss

    assert_neutral(tmp_path, adam(), loop=loop)
    # The loop runs without the recorder first; by hand, the moments of the second run are the first's alone.
    assert column(tmp_path / "run") == pytest.approx(expected[:STEPS], rel=1e-5)


def test_of_several_optimizers_and_several_steps_in_one_the_largest_counts(tmp_path: Path) -> None:
    seeded()
    model = Small()
    parameters = list(model.parameters())
    optimizers = [
        torch.optim.AdamW(part, lr=1e-2, betas=(0.8, BETA2), eps=EPS) for part in (parameters[:3], parameters[3:])
    ]  # fmt: skip
    by_hand = ByHand()
    found = []
    with Recorder(model, optimizers, tmp_path / "run", every=1) as recorder:
        for step in (0, 4, 1):  # the second has gradients 30 times as large
            backward(model, step)
            found.append(by_hand.see(parameters))
            for optimizer in optimizers:
                optimizer.step()
            if step == 4:
                continue  # a second optimizer step follows within the recorder's step
            recorder.step()
    assert found[1] > 1.2 * found[2]
    assert column(tmp_path / "run") == pytest.approx([found[0], found[1]], rel=1e-5)


def test_a_scalar_of_that_name_that_is_handed_in_wins(tmp_path: Path) -> None:
    model = Small()
    optimizer = adam()(model)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        backward(model, 0)
        optimizer.step()
        recorder.step(adam_rms=42.0)
    assert column(tmp_path / "run") == [42.0]


def test_a_gradient_that_is_no_number_is_recorded_as_what_it_is(tmp_path: Path) -> None:
    model = Small()
    optimizer = adam()(model)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        backward(model, 0)
        model.embed.weight.grad[0, 0] = math.nan  # type: ignore[index]
        optimizer.step()
        recorder.step()
    (value,) = open_run(tmp_path / "run").table("steps")["adam_rms"].to_pylist()
    assert value is not None
    assert math.isnan(value)


def stepped(shape: tuple[int, ...] = (4, 3)) -> tuple[nn.Parameter, torch.optim.AdamW]:
    parameter = nn.Parameter(torch.ones(shape))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.grad = torch.ones(shape)
    optimizer.step()
    return parameter, optimizer


def test_states_that_are_no_plain_average_of_the_gradients_entries_are_left_out() -> None:
    parameter, optimizer = stepped()
    assert len(second_moments(optimizer)) == 1
    state = optimizer.state[parameter]
    for changed in (
        {"exp_avg_sq": torch.ones(4)},  # factored, or of a projected gradient
        {"exp_avg_sq": torch.ones(4, 3, dtype=torch.uint8)},  # quantised
        {"exp_avg_sq": torch.ones(4, 3, device="meta")},  # elsewhere
        {"exp_avg_sq": None},
        {"step": 0},
        {"step": None},
        {"step": torch.ones(2)},
    ):
        optimizer.state[parameter] = {**state, **changed}
        assert second_moments(optimizer) == []
    optimizer.state[parameter] = {"state1": state["exp_avg"], "state2": state["exp_avg_sq"], "step": 1}
    assert second_moments(optimizer) == []


@pytest.mark.parametrize(
    "group",
    [{"betas": (0.9,)}, {"betas": (0.9, 0.99, 0.999)}, {"betas": (0.9, 1.0)}, {"eps": (1e-30, 1e-3)}, {"eps": None}],
    ids=str,
)  # fmt: skip
def test_a_group_whose_numbers_are_not_adams_is_left_out(group: dict[str, Any]) -> None:
    _, optimizer = stepped()
    optimizer.param_groups[0].update(group)
    assert second_moments(optimizer) == []


def test_step_and_betas_are_understood_as_numbers_tensors_and_of_the_group() -> None:
    parameter, optimizer = stepped()
    optimizer.param_groups[0]["betas"] = (torch.tensor(0.9), torch.tensor(0.5))
    del optimizer.state[parameter]["step"]
    optimizer.param_groups[0]["step"] = 7
    (found,) = second_moments(optimizer)
    assert (found.step, found.beta2) == (7.0, 0.5)


def test_a_sparse_gradient_has_no_value(tmp_path: Path) -> None:
    model = Small()
    model.embed.sparse = True
    model.head.weight = nn.Parameter(model.head.weight.detach().clone())
    rest = [p for name, p in model.named_parameters() if name != "embed.weight"]
    optimizers = [
        torch.optim.SparseAdam([model.embed.weight], lr=0.01),
        torch.optim.SGD(rest, lr=0.1),
    ]
    with Recorder(model, optimizers, tmp_path / "run", every=1) as recorder:
        loss = backward(model, 0)
        for optimizer in optimizers:
            optimizer.step()
        recorder.step(loss=loss)
    assert all(map(math.isnan, column(tmp_path / "run")))
    assert open_run(tmp_path / "run").info["faults"] == []
