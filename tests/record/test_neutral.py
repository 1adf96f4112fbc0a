"""With a recorder and without: the same bits in parameters, losses, gradients and random states."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from live_models import Small, batch
from live_neutral import STEPS, MakeOptimizer, Optimizer, assert_neutral, assert_same, seeded, trained
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from diagnostics.record.recorder import Recorder
from diagnostics.remedies.spectral_bound import SpectralBound
from diagnostics.store.read import open_run


def grouped(model: nn.Module) -> Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 1e-2}]
    return torch.optim.AdamW(groups, lr=1e-3)


OPTIMIZERS: dict[str, MakeOptimizer] = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=False),
    "AdamW foreach": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, foreach=True),
    "AdamW fused": lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, fused=True),
    "groups": grouped,
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
}


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_with_dropout_is_bit_identical_under_every_optimizer(
    name: str, every: int, tmp_path: Path
) -> None:
    assert_neutral(tmp_path, OPTIMIZERS[name], every=every)


def test_training_is_bit_identical_without_an_optimizer_given(tmp_path: Path) -> None:
    assert_neutral(tmp_path, OPTIMIZERS["AdamW"], optimizer_given=False)


def test_training_with_frozen_parts_is_bit_identical(tmp_path: Path) -> None:
    def freeze(model: nn.Module) -> None:
        assert isinstance(model, Small)
        model.layers[0].requires_grad_(requires_grad=False)

    def held(model: nn.Module) -> Optimizer:
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    assert_neutral(tmp_path, held, change=freeze)


def test_a_closure_is_bit_identical_and_its_updates_are_seen(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = model(batch(step)).square().mean()
            loss.backward()
            return loss

        return optimizer.step(closure)  # type: ignore[arg-type, return-value]

    def lbfgs(model: nn.Module) -> Optimizer:
        model.eval()  # dropout makes the line search meaningless
        return torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    assert_neutral(tmp_path, lbfgs, loop=loop)
    run = open_run(tmp_path / "run")
    assert set(run.updates()["step"]) == set(range(STEPS))
    assert (run.updates()["ratio"] > 0).all()
    assert run.steps()["grad_norm"].notna().all()


def test_skipped_optimizer_steps_are_bit_identical_and_leave_no_update_rows(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch(step)).square().mean()
        loss.backward()
        if step != 2:  # as a GradScaler does on an overflow
            optimizer.step()
        return loss

    assert_neutral(tmp_path, OPTIMIZERS["AdamW"], loop=loop)
    assert set(open_run(tmp_path / "run").updates()["step"]) == {0, 1, 3, 4}


def test_autocast_is_bit_identical(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss: Tensor = model(batch(step)).float().square().mean()
        loss.backward()
        optimizer.step()
        return loss

    assert_neutral(tmp_path, OPTIMIZERS["AdamW"], loop=loop)


def test_accumulated_micro_batches_are_bit_identical(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
        optimizer.zero_grad()
        loss = torch.zeros(())
        for micro in range(3):
            loss = model(batch(10 * step + micro)).square().mean()
            loss.backward()
        optimizer.step()
        return loss

    assert_neutral(tmp_path, OPTIMIZERS["AdamW"], loop=loop)


def test_two_recorders_on_one_model_are_bit_identical_and_both_record(tmp_path: Path) -> None:
    seeded()
    model = Small()
    twin = copy.deepcopy(model)
    seeded()
    plain = trained(model, OPTIMIZERS["AdamW"](model), None)
    seeded()
    optimizer = OPTIMIZERS["AdamW"](twin)
    with (
        Recorder(twin, optimizer, tmp_path / "a", every=1) as first,
        Recorder(twin, optimizer, tmp_path / "b", every=2) as second,
    ):
        step = first.step

        def both(loss: Tensor) -> None:
            step(loss=loss)
            second.step(loss=loss)

        first.step = both  # type: ignore[method-assign, assignment]
        other = trained(twin, optimizer, first)
    assert_same(plain, other)
    a, b = open_run(tmp_path / "a").attention(), open_run(tmp_path / "b").attention()
    assert set(a["step"]) == set(range(STEPS))
    assert set(b["step"]) == {0, 2, 4}
    both_measured = a[a["step"].isin([0, 2, 4])].reset_index(drop=True)
    assert both_measured.equals(b)
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("tau", [None, float("inf"), 1e6])
def test_a_bound_that_never_fires_is_bit_identical(tau: float | None, tmp_path: Path) -> None:
    seeded()
    model = Small()
    twin = copy.deepcopy(model)
    seeded()
    plain = trained(model, OPTIMIZERS["AdamW"](model), None)
    seeded()
    optimizer = OPTIMIZERS["AdamW"](twin)
    bound = None if tau is None else SpectralBound(optimizer, tau)
    with Recorder(twin, optimizer, tmp_path / "run", every=2) as recorder:
        other = trained(twin, optimizer, recorder)
    assert_same(plain, other)
    assert bound is None or bound.summary()["fired_share"] == 0.0


def test_what_is_pickled_copied_or_saved_while_attached_carries_nothing_of_ours(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    before = (
        set(vars(model)),
        sorted(model.state_dict()),
        pickle.dumps(model),
        sorted(optimizer.state_dict()),
    )
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        assert (set(vars(model)), sorted(model.state_dict()), pickle.dumps(model)) == before[:3]
        assert b"diagnostics" not in pickle.dumps(optimizer)
        copied = copy.deepcopy(optimizer)
        assert not copied._optimizer_step_pre_hooks
        assert sorted(optimizer.state_dict()) == before[3]
        model(batch(0)).sum().backward()
        optimizer.step()
        recorder.step()
        torch.save(model, tmp_path / "model.pt")
    saved = (tmp_path / "model.pt").read_bytes()
    assert not any(part in saved for part in (b"diagnostics.record", b"diagnostics.attach"))


def test_closing_takes_every_hook_off(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    functions = (nn.functional.scaled_dot_product_attention, nn.functional.multi_head_attention_forward)
    recorder = Recorder(model, optimizer, tmp_path / "run", every=1)
    assert len(module_hooks._global_forward_hooks) == 1
    recorder.close()
    recorder.close()
    assert not module_hooks._global_forward_hooks
    assert not module_hooks._global_forward_pre_hooks
    assert not module_hooks._global_forward_hooks_always_called
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert torch._C._len_torch_function_stack() == 0
    assert functions == (
        nn.functional.scaled_dot_product_attention,
        nn.functional.multi_head_attention_forward,
    )
