"""Compiled models: observed beside their forward, which itself never differs, recompiles or breaks."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional

from diagnostics import Recorder, open_run
from diagnostics.demo.gpt import GPT, GPTShape

# Dynamo itself warns of deprecated things while it traces.
pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 5


class Model(nn.Module):
    """A GPT with what a second forward would disturb: dropout, running statistics, a counter, an auxiliary loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gpt = GPT(GPTShape(width=16, layers=2, heads=2, context=8))
        self.norm = nn.BatchNorm1d(8)
        self.calls = torch.zeros(())
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, tokens_bt: Tensor) -> Tensor:
        self.seen += 1
        logits_btv = self.norm(self.gpt(tokens_bt))
        return functional.dropout(logits_btv, 0.1, self.training)


def compiled(kind: str) -> tuple[nn.Module, nn.Module]:
    """The model to attach to, and what the training loop calls."""
    torch.manual_seed(0)
    model = Model()
    if kind == "in place":
        model.compile(backend="eager", fullgraph=True)
        return model, model
    if kind == "block by block":
        for block in model.gpt.blocks:
            block.compile(backend="eager", fullgraph=True)
        return model, model
    wrapper: Any = torch.compile(model, backend="eager", fullgraph=True)
    return (wrapper if kind == "wrapper attached" else model), wrapper


def trained(kind: str, run_dir: Path | None) -> dict[str, object]:
    torch._dynamo.reset()
    counters.clear()
    model, call = compiled(kind)
    calls = [getattr(module, "_compiled_call_impl", None) for module in model.modules()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    recorder = None if run_dir is None else Recorder(model, optimizer, run_dir, every=2)
    losses, graphs = [], []
    for step in range(STEPS):
        tokens_bt = (torch.arange(24).view(3, 8) * 7 + step) % 256
        loss = functional.cross_entropy(call(tokens_bt).flatten(0, 1), tokens_bt.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if recorder is not None:
            recorder.step(loss=loss)
        graphs.append((counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())))
    if recorder is not None:
        copy.deepcopy(model.state_dict())
        recorder.close()
    assert calls == [getattr(module, "_compiled_call_impl", None) for module in model.modules()]
    return {
        "losses": losses,
        "graphs": graphs,
        "state": [value.tolist() for value in model.state_dict().values()],
        "rng": torch.get_rng_state().tolist(),
    }


@pytest.mark.parametrize("kind", ["wrapper attached", "inner attached", "in place", "block by block"])
def test_a_compiled_model_trains_bit_for_bit_as_without_and_every_head_is_observed(
    kind: str, tmp_path: Path
) -> None:
    assert trained(kind, tmp_path / "run") == trained(kind, None)
    run = open_run(tmp_path / "run")
    assert run.info["faults"] == []
    assert run.info["attention_observed"] == "beside the compiled forward"
    frame = run.attention()
    assert sorted(set(frame["step"])) == [0, 2, 4]
    assert len(frame) == 3 * 2 * 2
    assert {name.removeprefix("_orig_mod.") for name in frame["layer"]} == {
        "gpt.blocks.0.attn",
        "gpt.blocks.1.attn",
    }
    assert len(run.spectra()) == len(frame)


def test_a_compiled_training_function_is_not_broken_and_its_blindness_is_told(tmp_path: Path) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(GPTShape(width=16, layers=1, heads=2, context=8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss_of(tokens_bt: Tensor) -> Tensor:
        return functional.cross_entropy(model(tokens_bt).flatten(0, 1), tokens_bt.flatten())

    fast = torch.compile(loss_of, backend="eager", fullgraph=True)
    tokens_bt = torch.arange(16).view(2, 8)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        for _ in range(3):
            loss = fast(tokens_bt)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    run = open_run(tmp_path / "run")
    assert len(run.steps()) == 3
    assert len(run.attention()) == 0
    assert "no attention call was observed" in run.events()["message"].iloc[0]
