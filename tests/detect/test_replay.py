"""A stored run judged again gives what was said live; nothing is seen ahead of time."""

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from synthetic import write_table
from torch.nn import functional

from diagnostics import Recorder, assess, open_run
from diagnostics.demo.gpt import GPT, GPTShape
from diagnostics.demo.text import ByteBatches, standard_library_text
from diagnostics.store.format import TABLES

STEPS = 84
"""No multiple of `every`: the last losses lie after the last measured step."""


@pytest.fixture(scope="module")
def failing_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT at a rate far too high: its attention collapses within a few dozen steps."""
    run_dir = tmp_path_factory.mktemp("runs") / "failing"
    torch.manual_seed(0)
    model = GPT(GPTShape(width=32, layers=2, heads=2, context=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2, betas=(0.9, 0.99), weight_decay=0.1)
    batches = ByteBatches(standard_library_text(), batch_size=16, context=32, seed=0)
    with Recorder(model, optimizer, run_dir, every=10) as recorder:
        for step in range(STEPS):
            inputs_bt, targets_bt = batches.next()
            loss = functional.cross_entropy(model(inputs_bt).flatten(0, 1), targets_bt.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # The last steps lose their loss, so that an alert has to come from the frame made at the end.
            recorder.step(loss=loss if step < STEPS - 3 else float("nan"))
    return run_dir


def test_a_replay_raises_the_alerts_that_were_raised_live(failing_run: Path) -> None:
    events = open_run(failing_run).table("events").to_pylist()
    live = [
        (row["step"], row["layer"], json.loads(row["data"])["kind"])
        for row in events
        if row["kind"] == "alert"
    ]
    replayed = [(f.raised_step, f.layer, f.kind) for f in assess(failing_run).findings]
    assert {kind for _, _, kind in live} >= {"spectral-concentration", "divergence"}
    assert sorted(live, key=str) == sorted(replayed, key=str)


def test_judging_up_to_a_step_sees_nothing_after_it(failing_run: Path, tmp_path: Path) -> None:
    # Truncated by deleting rows, not by trusting the reader: the two must agree at every step.
    for up_to in (0, 9, 20, 25, 40, 80, STEPS - 1):
        cut = tmp_path / str(up_to)
        cut.mkdir()
        shutil.copy(failing_run / "run.json", cut)
        for table in TABLES:
            for part in (failing_run / table).glob("*.parquet"):
                rows = [row for row in pq.read_table(part).to_pylist() if row["step"] <= up_to]
                if rows:
                    write_table(cut, table, rows, number=int(part.stem.split("-")[-1]))
        ahead, truncated = assess(failing_run, up_to_step=up_to), assess(cut)
        assert (ahead.status, ahead.step, ahead.findings) == (
            truncated.status,
            truncated.step,
            truncated.findings,
        )
        assert ahead.step == up_to
        assert all((f.raised_step or 0) <= up_to for f in ahead.findings)


def test_a_negative_step_is_refused(failing_run: Path) -> None:
    with pytest.raises(ValueError, match="up_to_step is -1"):
        assess(failing_run, up_to_step=-1)
