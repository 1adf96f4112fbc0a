"""The command against a real training: what it prints is what the recorder did."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diagnostics import Recorder, open_run

Command = Callable[..., Any]


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Path]:
    run = tmp_path / "run"
    ended, started = threading.Event(), threading.Event()
    faults: list[BaseException] = []

    def train() -> None:
        try:
            torch.manual_seed(0)
            model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            optimizer = torch.optim.AdamW(model.parameters())
            with Recorder(model, optimizer, run, every=5) as recorder:
                while not ended.is_set():
                    loss = model(torch.randn(2, 5, 16)).square().mean()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    recorder.step(loss=loss)
                    started.set()
                    time.sleep(0.005)
        except BaseException as fault:
            faults.append(fault)
            started.set()
            raise

    thread = threading.Thread(target=train)
    thread.start()
    assert started.wait(60.0)
    yield run
    ended.set()
    thread.join(60.0)
    assert faults == []


def test_the_bound_is_armed_changed_and_taken_off_a_training_that_goes_on(
    diagnostics: Command, training: Path
) -> None:
    armed = diagnostics("control", training, "spectral-bound", "--tau", "0.02")
    assert armed.code == 0
    assert "  armed: False -> True" in armed.out.splitlines()
    changed = diagnostics("control", training, "spectral-bound", "--tau", "0.01")
    assert changed.code == 0
    assert "  tau: 0.02 -> 0.01" in changed.out.splitlines()
    asked = diagnostics("control", training, "status")
    assert asked.code == 0
    assert "mode: suggest" in asked.out
    assert "tau 0.01" in asked.out
    disarmed = diagnostics("control", training, "disarm", "spectral-bound")
    assert disarmed.code == 0
    assert "  armed: True -> False" in disarmed.out.splitlines()


def test_a_remedy_that_is_not_armed_cannot_be_taken_off(diagnostics: Command, training: Path) -> None:
    ended = diagnostics("control", training, "disarm", "spectral-bound")
    assert ended.code == 1
    assert "is not armed" in ended.out


def test_a_command_that_this_version_cannot_carry_out_is_rejected_by_the_run(
    diagnostics: Command, training: Path
) -> None:
    ended = diagnostics("control", training, "lr-scale", "--factor", "0.5")
    assert ended.code == 1
    assert "rejected" in ended.out
    assert open_run(training).info["state"] == "running"
