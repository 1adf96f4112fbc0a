"""Training with a recorder and without, and everything that a recorder could have changed, compared bit for bit."""

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from live_models import Small, batch
from torch import Tensor, nn

from diagnostics.record.recorder import Recorder
from diagnostics.store.read import open_run

Optimizer = torch.optim.Optimizer
MakeOptimizer = Callable[[nn.Module], Optimizer]
STEPS = 5


def seeded() -> None:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the global state is what is tested


def states() -> tuple[Any, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())  # noqa: NPY002 - as above


def trained(
    model: nn.Module,
    optimizer: Optimizer,
    recorder: Recorder | None,
    *,
    loop: Callable[..., Tensor] | None = None,
) -> dict[str, Any]:
    """A few steps, and everything that a recorder could have changed."""
    seen: dict[str, Any] = {"losses": [], "gradients": []}
    for step in range(STEPS):
        if loop is not None:
            loss = loop(model, optimizer, step)
        else:
            optimizer.zero_grad()
            loss = model(batch(step)).square().mean()
            loss.backward()
            optimizer.step()
        seen["losses"].append(loss.item())
        seen["gradients"].append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        if recorder is not None:
            recorder.step(loss=loss)
    seen["parameters"] = [p.detach().clone() for p in model.parameters()]
    seen["random"] = states()
    return seen


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Stricter than equality (the sign of zero counts), and NaN is what it is."""
    bits = [x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def assert_same(plain: dict[str, Any], other: dict[str, Any]) -> None:
    assert plain["losses"] == other["losses"]
    assert plain["random"] == other["random"]
    for a, b in zip(plain["parameters"], other["parameters"], strict=True):
        assert same_bits(a, b)
    for mine, theirs in zip(plain["gradients"], other["gradients"], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a is None) == (b is None)
            assert a is None or same_bits(a, b)


def assert_neutral(
    tmp_path: Path,
    make: MakeOptimizer,
    *,
    every: int = 1,
    change: Callable[[nn.Module], None] = lambda _: None,
    loop: Callable[..., Tensor] | None = None,
    optimizer_given: bool = True,
) -> None:
    seeded()
    model = Small()
    change(model)
    twin = copy.deepcopy(model)
    seeded()
    plain = trained(model, make(model), None, loop=loop)
    seeded()
    optimizer = make(twin)
    with Recorder(twin, optimizer if optimizer_given else None, tmp_path / "run", every=every) as recorder:
        other = trained(twin, optimizer, recorder, loop=loop)
    assert_same(plain, other)
    run = open_run(tmp_path / "run")
    assert run.info["faults"] == []
    assert len(run.steps()) == STEPS
    assert set(run.attention()["step"]) == set(range(0, STEPS, every))
