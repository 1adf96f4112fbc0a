"""DIAGNOSTICS_ACTIVATIONS=0: spectra of verified layouts and updates, and no forward watched but the first."""

import copy
from pathlib import Path

import pytest
import torch
from live import assert_spectra
from live_models import WIDTH, Small, batch
from live_neutral import STEPS, assert_same, seeded, trained
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from diagnostics.demo.gpt import CausalSelfAttention, GPTShape
from diagnostics.errors import RecorderWarning
from diagnostics.record.recorder import Recorder
from diagnostics.store.read import Run, open_run


@pytest.fixture(autouse=True)
def _activations_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIAGNOSTICS_ACTIVATIONS", "0")


def test_training_is_bit_identical_and_only_spectra_and_updates_are_recorded(tmp_path: Path) -> None:
    seeded()
    model = Small()
    twin = copy.deepcopy(model)
    seeded()
    plain = trained(model, torch.optim.AdamW(model.parameters()), None)
    seeded()
    optimizer = torch.optim.AdamW(twin.parameters())
    with Recorder(twin, optimizer, tmp_path / "run", every=2) as recorder:
        other = trained(twin, optimizer, recorder)
    assert_same(plain, other)
    run = open_run(tmp_path / "run")
    assert run.attention().empty
    assert set(run.spectra()["step"]) == set(run.updates()["step"]) == set(range(0, STEPS, 2))
    assert len(run.spectra()) == 3 * 4
    assert run.info["attention_observed"].startswith("not at all (DIAGNOSTICS_ACTIVATIONS=0)")
    assert {site["verified"] for site in run.info["sites"]} == {"probe", "call"}
    assert run.info["faults"] == []


def recorded(model: nn.Module, run_dir: Path, used: list[Tensor], steps: int = 3) -> Run:
    """Every step measured; `used` receives the first layer's weight as each forward meets it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with Recorder(model, optimizer, run_dir, every=1) as recorder:
        for step in range(steps):
            # After the first step that saw attention no forward is touched any more.
            assert bool(module_hooks._global_forward_hooks) == (step == 0)
            used.append(model.get_parameter("layers.0.c_attn.weight").detach().clone())
            model(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    return open_run(run_dir)


def test_spectra_are_of_the_weights_that_each_forward_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    used: list[Tensor] = []
    run = recorded(Small(), tmp_path / "run", used)
    for step, weight in enumerate(used):
        wq, wk, _ = weight.split(WIDTH)
        assert_spectra(run, "layers.0", wq.split(8), wk.split(8), step=step)
    assert not torch.equal(used[1], used[2])


def test_a_layer_added_later_is_probed_once_too(tmp_path: Path) -> None:
    model = Small()
    with Recorder(model, run_dir=tmp_path / "run", every=1) as recorder:
        for step in range(4):
            if step == 1:
                model.layers.append(CausalSelfAttention(GPTShape(width=WIDTH, heads=2)))
            model(batch(step)).sum().backward()
            recorder.step()
    spectra = open_run(tmp_path / "run").spectra(start_step=3)
    assert set(spectra["layer"]) == {"layers.0", "layers.1.self_attn", "layers.2"}


def test_a_run_without_a_training_forward_says_so(tmp_path: Path) -> None:
    with Recorder(Small(), run_dir=tmp_path / "run", every=1) as recorder:
        with pytest.warns(RecorderWarning, match="no attention call was observed"):
            recorder.step()
        recorder.step()
    assert open_run(tmp_path / "run").spectra().empty
