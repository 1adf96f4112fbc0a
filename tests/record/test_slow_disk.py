"""A disk that takes its time, or stops: training goes on, no step's row is lost, what is thinned is said."""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from live_models import Small, batch

from diagnostics import Recorder, open_run
from diagnostics.record import stream
from diagnostics.store.format import MANIFEST

_EVERY = 50


class Disk:
    """Stands in for `os.fsync` and for writing Parquet; holds up every thread that writes while `stuck`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        self.go.set()
        self.met = threading.Event()
        self.delay_s = 0.0
        self.threads: set[str] = set()
        for module, name in ((os, "fsync"), (pq, "write_table")):
            monkeypatch.setattr(module, name, self._slow(getattr(module, name)))

    def _slow(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*arguments: Any, **options: Any) -> Any:
            self.threads.add(threading.current_thread().name)
            if not self.go.is_set():
                self.met.set()
            assert self.go.wait(120), "the test forgot to let the disk go on"
            time.sleep(self.delay_s)
            return call(*arguments, **options)

        return slow


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    disk = Disk(monkeypatch)
    yield disk
    disk.go.set()


def _train(
    recorder: Recorder, model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range
) -> None:
    for step in steps:
        # A step that is not measured costs nothing here: the disk is what is tried, not the model.
        if step % _EVERY == 0:
            model(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        recorder.step(loss=float(step), twice=2.0 * step)


def _expect_every_step_and_the_thinned_ones_told(run_dir: Path, steps: int) -> int:
    run = open_run(run_dir)
    rows = run.table("steps").to_pylist()
    assert [row["step"] for row in rows] == list(range(steps))
    assert all(row["loss"] == row["step"] and row["twice"] == 2.0 * row["step"] for row in rows)
    kept = {
        table: set(run.table(table, ["step"]).column("step").to_pylist())
        for table in ("attention", "spectra")
    }
    assert kept["attention"] == kept["spectra"]
    missing = sorted(set(range(0, steps, _EVERY)) - kept["attention"])
    manifest = json.loads((run_dir / MANIFEST).read_text())
    thinned = manifest.get("thinned") or {"measured_steps": 0}
    assert thinned["measured_steps"] == len(missing)
    if missing:
        assert thinned["last_step"] == missing[-1]
    told = [row["step"] for row in run.table("events").to_pylist() if row["kind"] == "warning"]
    assert [step for step in missing if step not in told] == []
    assert run.info["faults"] == []
    assert run.damaged == {}
    return len(missing)


def test_two_thousand_steps_go_by_while_the_disk_stands_still(disk: Disk, tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Recorder(model, optimizer, tmp_path / "run", every=_EVERY) as recorder:
        _train(recorder, model, optimizer, range(_EVERY + 1))
        disk.threads.clear()
        disk.go.clear()
        # Training goes on until the disk has been met, and then for 2,000 steps that nothing holds up.
        step = _EVERY + 1
        begun_s = time.monotonic()
        while not disk.met.is_set():
            _train(recorder, model, optimizer, range(step, step + 1))
            step += 1
            time.sleep(0.001)
            assert time.monotonic() - begun_s < 60, "nothing was written for a minute"
        _train(recorder, model, optimizer, range(step, step + 2000))
        assert not disk.go.is_set()
        assert threading.current_thread().name not in disk.threads
        # Whoever reads now sees all of them, though nothing of it could be synced.
        assert open_run(tmp_path / "run").table("steps", ["step"]).num_rows == step + 2000
        disk.go.set()
    # What was measured meanwhile waits in the tail and in memory; a run of this size needs no thinning.
    assert _expect_every_step_and_the_thinned_ones_told(tmp_path / "run", step + 2000) == 0


def test_measured_steps_that_memory_cannot_hold_are_thinned_and_told(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CADENCE", stream.Cadence(flush_after_s=0.05, flush_rows=100))
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Recorder(model, optimizer, tmp_path / "run", every=_EVERY) as recorder:
        disk.go.clear()
        step = 0
        while not disk.met.is_set():
            _train(recorder, model, optimizer, range(step, step + 1))
            step += 1
            time.sleep(0.001)
        _train(recorder, model, optimizer, range(step, step + 2000))
        # Steps are read from the tail by others though this process holds no more of them.
        assert open_run(tmp_path / "run").table("steps", ["step"]).num_rows == step + 2000
        disk.go.set()
    assert _expect_every_step_and_the_thinned_ones_told(tmp_path / "run", step + 2000) > 0


def test_a_disk_of_300_ms_a_write_loses_no_step(
    disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CADENCE", stream.Cadence(flush_after_s=0.02, idle_s=0.01))
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with Recorder(model, optimizer, tmp_path / "run", every=_EVERY) as recorder:
        disk.threads.clear()
        disk.delay_s = 0.3
        for step in range(0, 1000, 10):
            _train(recorder, model, optimizer, range(step, step + 10))
            time.sleep(0.005)
        assert disk.threads
        assert threading.current_thread().name not in disk.threads
        disk.delay_s = 0.0
    _expect_every_step_and_the_thinned_ones_told(tmp_path / "run", 1000)
