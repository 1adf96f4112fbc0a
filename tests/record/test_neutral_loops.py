"""The same bits with a recorder and without, in the training loops that libraries and large models use."""

import copy
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from live_models import Small, batch
from live_neutral import STEPS, Optimizer, assert_neutral, assert_same, seeded, states, trained
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from diagnostics.errors import RecorderWarning
from diagnostics.record.recorder import Recorder
from diagnostics.store.read import open_run


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


@pytest.mark.parametrize("fused", [False, True])
def test_fp16_with_a_grad_scaler_is_bit_identical_and_skipped_steps_change_nothing(
    fused: bool,  # noqa: FBT001 - a parameter
    tmp_path: Path,
) -> None:
    skipped: list[list[int]] = []
    scalers: dict[int, Any] = {}

    def loop(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
        if step == 0:
            scalers[id(optimizer)] = torch.amp.GradScaler("cpu", init_scale=2.0**16)
            skipped.append([])
        scaler = scalers[id(optimizer)]
        if step == 2:
            scaler.update(2.0**40)  # overflows float16 for certain
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss: Tensor = 1e-3 * model(batch(step)).float().square().mean()
        scaler.scale(loss).backward()
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update(2.0**16 if step == 2 else None)
        if step == 2 or scaler.get_scale() < before:
            skipped[-1].append(step)
        return loss

    def make(model: nn.Module) -> Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)

    assert_neutral(tmp_path, make, loop=loop)
    assert skipped == [[2], [2]]
    updates = open_run(tmp_path / "run").updates()
    taken = updates[updates["step"] != 2]
    assert set(taken["step"]) == {0, 1, 3, 4}
    assert (taken["update_sigma1"] > 0).all()
    # A fused optimizer is called and skips by itself: no change is what there was.
    assert (updates[updates["step"] == 2]["update_sigma1"] == 0).all()
    assert fused or 2 not in set(updates["step"])


@pytest.mark.parametrize("clip", [clip_grad_norm_, clip_grad_value_])
def test_clipped_gradients_are_bit_identical(clip: Callable[..., object], tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(batch(step)).square().mean()
        loss.backward()
        clip(model.parameters(), 0.01)
        optimizer.step()
        return loss

    assert_neutral(tmp_path, adamw, loop=loop)


def in_backward(model: nn.Module) -> list[Optimizer]:
    """One optimizer per parameter, stepped as soon as its gradient is there, which is then let go."""
    optimizers: dict[nn.Parameter, Optimizer] = {
        p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters()
    }

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    return list(optimizers.values())


def test_an_optimizer_in_the_backward_is_bit_identical_and_every_update_is_seen(tmp_path: Path) -> None:
    def loop(model: nn.Module, _: object, step: int) -> Tensor:
        loss: Tensor = model(batch(step)).square().mean()
        loss.backward()
        return loss

    seeded()
    model = Small()
    twin = copy.deepcopy(model)
    in_backward(model)
    optimizers = in_backward(twin)
    seeded()
    plain = trained(model, adamw(model), None, loop=loop)
    seeded()
    with Recorder(twin, optimizers, tmp_path / "run", every=2) as recorder:
        other = trained(twin, optimizers[0], recorder, loop=loop)
    assert_same(plain, other)
    run = open_run(tmp_path / "run")
    assert run.info["faults"] == []
    matrices = {name for name, p in twin.named_parameters() if p.ndim == 2}
    assert set(run.updates(start_step=2, end_step=2)["parameter"]) == matrices
    assert (run.updates()["update_sigma1"] > 0).all()
    assert list(run.steps()["grad_norm"].notna()) == [True, False, True, False, True]
    assert len(run.spectra(end_step=0)) == 4
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in optimizers)


def test_several_optimizers_may_come_in_any_iterable_but_not_as_a_mapping(tmp_path: Path) -> None:
    model = Small()
    optimizers = {name: torch.optim.SGD([p], lr=0.1) for name, p in model.named_parameters()}
    with Recorder(model, optimizers.values(), tmp_path / "run", every=1) as recorder:  # type: ignore[arg-type]
        assert len(recorder._optimizers) == len(optimizers)
    with pytest.raises(ValueError, match=r"optimizer is a dict, it must be a torch\.optim\.Optimizer"):
        Recorder(model, optimizers, tmp_path / "other")  # type: ignore[arg-type]


def test_accelerate_with_accumulation_is_bit_identical_and_real_steps_are_seen(tmp_path: Path) -> None:
    accelerate = import_module("accelerate")  # of the zoo extra, which `make test` installs

    def train(run_dir: Path | None) -> dict[str, Any]:
        seeded()
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
        inner = Small()
        model, optimizer = accelerator.prepare(inner, adamw(inner))
        recorder = None if run_dir is None else Recorder(model, optimizer, run_dir, every=1)
        losses = []
        for micro in range(2 * STEPS):
            with accelerator.accumulate(model):
                loss = model(batch(micro)).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if recorder is not None and accelerator.sync_gradients:
                recorder.step(loss=loss)
        if recorder is not None:
            recorder.close()
        parameters = [p.detach().clone() for p in model.parameters()]
        return {"losses": losses, "parameters": parameters, "gradients": [], "random": states()}

    assert_same(train(None), train(tmp_path / "run"))
    run = open_run(tmp_path / "run")
    assert run.info["faults"] == []
    assert list(run.steps()["step"]) == list(range(STEPS))
    assert set(run.updates()["step"]) == set(range(STEPS))
    assert (run.updates()["update_sigma1"] > 0).all()
    assert set(run.attention()["rows"]) == {18}  # the first of two micro-batches: 3 sequences of 6


@pytest.fixture
def one_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
@pytest.mark.parametrize("attached", ["wrapper", "inner"])
def test_a_model_wrapped_for_data_parallel_training_is_bit_identical(attached: str, tmp_path: Path) -> None:
    seeded()
    model = DistributedDataParallel(Small())
    twin = DistributedDataParallel(copy.deepcopy(model.module))
    seeded()
    plain = trained(model, adamw(model), None)
    seeded()
    optimizer = adamw(twin)
    subject = twin if attached == "wrapper" else twin.module
    with Recorder(subject, optimizer, tmp_path / "run", every=2) as recorder:
        other = trained(twin, optimizer, recorder)
    assert_same(plain, other)
    run = open_run(tmp_path / "run")
    assert run.info["faults"] == []
    prefix = "module." if attached == "wrapper" else ""
    expected = {f"{prefix}layers.0", f"{prefix}layers.1.self_attn"}
    assert set(run.attention()["layer"]) == set(run.spectra()["layer"]) == expected
    assert set(run.attention()["step"]) == {0, 2, 4}
    assert f"{prefix}layers.0.c_attn.weight" in set(run.updates()["parameter"])


def test_a_recorder_on_a_submodule_sees_that_part_alone_and_is_bit_identical(tmp_path: Path) -> None:
    seeded()
    model = Small()
    twin = copy.deepcopy(model)
    seeded()
    plain = trained(model, adamw(model), None)
    seeded()
    optimizer = adamw(twin)
    with Recorder(twin.layers[1], optimizer, tmp_path / "run", every=1) as recorder:
        other = trained(twin, optimizer, recorder)
    assert_same(plain, other)
    run = open_run(tmp_path / "run")
    assert set(run.attention()["layer"]) == set(run.spectra()["layer"]) == {"self_attn"}
    assert set(run.updates()["parameter"]) == {
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
    }  # fmt: skip


def test_a_part_frozen_while_recording_is_bit_identical_and_has_no_updates_from_then_on(
    tmp_path: Path,
) -> None:
    def loop(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
        if step == 2:
            model.get_submodule("layers.0").requires_grad_(requires_grad=False)
        optimizer.zero_grad()
        loss: Tensor = model(batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    assert_neutral(tmp_path, adamw, loop=loop)
    updates = open_run(tmp_path / "run").updates()
    frozen = updates[updates["parameter"].str.startswith("layers.0.")]
    assert set(frozen["step"]) == {0, 1}
    assert set(updates["step"]) == set(range(STEPS))


def test_a_forward_that_raises_is_the_users_and_the_next_steps_are_bit_identical(tmp_path: Path) -> None:
    def loop(model: nn.Module, optimizer: Optimizer, step: int) -> Tensor:
        if step == 1:
            with pytest.raises(IndexError):
                model(batch(step) + 1000)
        optimizer.zero_grad()
        loss: Tensor = model(batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error", RecorderWarning)
        assert_neutral(tmp_path, adamw, loop=loop)
