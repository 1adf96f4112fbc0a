"""Replaying a run gives the very alerts that were raised live, however it was flushed, saved and resumed."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from diagnostics import Recorder, assess, open_run
from diagnostics.demo.gpt import GPT, GPTShape
from diagnostics.demo.text import ByteBatches, standard_library_text
from diagnostics.record import stream

STEPS = 120
Told = list[tuple[Any, ...]]


def train(run_dir: Path, stops: list[int], *, every: int, saved_after_close: bool = False) -> None:
    """A tiny GPT at a rate far too high, stopped at some steps and gone on with in a recorder of its own each time."""
    torch.manual_seed(0)
    model = GPT(GPTShape(width=32, layers=2, heads=2, context=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, betas=(0.9, 0.99), weight_decay=0.1)
    batches = ByteBatches(standard_library_text(), batch_size=8, context=32, seed=0)
    state: dict[str, Any] | None = None
    for first, last in pairwise([0, *stops, STEPS]):
        with Recorder(model, optimizer, run_dir, every=every) as recorder:
            if state is not None:
                recorder.load_state_dict(state)
            for step in range(first, last):
                inputs_bt, targets_bt = batches.next()
                loss = functional.cross_entropy(model(inputs_bt).flatten(0, 1), targets_bt.flatten())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                recorder.step(loss=loss if step < STEPS - 4 else float("nan"))
            if not saved_after_close:
                state = recorder.state_dict()
        if saved_after_close:
            state = recorder.state_dict()


def told_live(run_dir: Path) -> Told:
    events = open_run(run_dir).events()
    alerts = [json.loads(data) for data in events[events.kind == "alert"].data]
    assert events[events.kind == "alert"].step.tolist() == [alert["raised_step"] for alert in alerts]
    return [_core(alert) for alert in alerts]


def told_by_replay(run_dir: Path) -> Told:
    return [_core(finding.to_dict()) for finding in assess(run_dir).findings]


def _core(told: dict[str, Any]) -> tuple[Any, ...]:
    keys = ("raised_step", "kind", "layer", "head", "first_step", "severity", "message")
    return (*(told[key] for key in keys), json.dumps(told["evidence"], sort_keys=True))


@pytest.fixture(scope="module")
def in_one_go(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(run_dir, [], every=10)
    return run_dir


def test_a_run_in_one_go_is_told_alike_live_and_replayed(in_one_go: Path) -> None:
    live = told_live(in_one_go)
    assert {kind for _, kind, *_ in live} >= {"divergence"}
    assert len(live) >= 2
    assert sorted(live, key=str) == sorted(told_by_replay(in_one_go), key=str)


@pytest.mark.parametrize("saved_after_close", [False, True])
@pytest.mark.parametrize("stops", [[40], [41, 75], [7, 33, 90]])
def test_a_run_stopped_and_resumed_is_told_as_one_in_one_go(
    tmp_path: Path, stops: list[int], *, saved_after_close: bool
) -> None:
    run_dir = tmp_path / "run"
    train(run_dir, stops, every=10, saved_after_close=saved_after_close)
    # Not compared with the run in one go: on a busy machine either may have left out a measured step.
    live = told_live(run_dir)
    assert len(live) >= 2
    assert sorted(live, key=str) == sorted(told_by_replay(run_dir), key=str)


@pytest.mark.parametrize(("flush_rows", "every"), [(1, 10), (1, 3), (10**6, 1)])
def test_the_flushes_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_rows: int, every: int
) -> None:
    monkeypatch.setattr(stream, "CADENCE", replace(stream.CADENCE, flush_rows=flush_rows, idle_s=0.01))
    train(tmp_path / "run", [], every=every)
    live = told_live(tmp_path / "run")
    assert live
    assert sorted(live, key=str) == sorted(told_by_replay(tmp_path / "run"), key=str)
