"""What a recorder has on disk at each moment, and what run.json says of it."""

import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_models import Small, batch
from torch import Tensor, nn

from diagnostics.record import background, stream
from diagnostics.record.recorder import Recorder
from diagnostics.record.scalars import Scalars
from diagnostics.record.stream import Cadence
from diagnostics.store.read import open_run
from diagnostics.store.tail.decode import read_generation
from diagnostics.store.tail.frames import NULL, PENDING

HURRIED = Cadence(flush_after_s=0.01, flush_at_most_s=0.01, idle_s=0.002, segment_bytes=1024)
NEVER = Cadence(flush_after_s=1e9, flush_at_most_s=1e9, flush_rows=10**9, idle_s=0.002, segment_bytes=1024)


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However busy the machine is, nothing is thinned."""
    monkeypatch.setattr(background, "_SLOT_WAIT_S", 60.0)
    monkeypatch.setattr(background, "_SLOT_WAIT_ON_DISK_S", 60.0)


@pytest.fixture(params=["hurried", "never"])
def cadence(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Cadence:
    """Flushes all the time, and none but the last."""
    chosen = HURRIED if request.param == "hurried" else NEVER
    monkeypatch.setattr(stream, "CADENCE", chosen)
    return chosen


class Training:
    """A small model that is recorded; `step` trains one step."""

    def __init__(self, run_dir: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.run_dir = run_dir
        self.model: nn.Module = Small()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-2)
        self.recorder = Recorder(self.model, self.optimizer, run_dir, **{"every": 2, **options})

    def step(self, step: int, **scalars: object) -> None:
        loss = self.model(batch(step)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.recorder.step(**{"loss": float(step), **scalars})


@pytest.fixture
def training(tmp_path: Path, cadence: Cadence) -> Iterator[Training]:
    training = Training(tmp_path / "run")
    yield training
    training.recorder.close()
    assert open_run(tmp_path / "run").info["faults"] == []


def test_each_step_is_on_disk_when_step_returns_and_its_measurements_when_the_next_measured_step_does(
    training: Training,
) -> None:
    for step in range(24):
        training.step(step, twice=2.0 * step)
        run = open_run(training.run_dir)
        assert run.table("steps", ["step", "twice"]).to_pylist() == [
            {"step": done, "twice": 2.0 * done} for done in range(step + 1)
        ]
        last_measured = step // 2 * 2
        # Two sites of two heads, seven matrices.
        for table, count in (("attention", 4), ("spectra", 4), ("updates", 7)):
            rows = run.table(table, ["step"]).column("step").to_pylist()
            assert set(range(0, last_measured, 2)) <= set(rows)
            assert len(rows) == count * len(set(rows))
        assert run.damaged == {}


def test_nothing_is_left_in_the_tail_of_a_run_that_was_closed(training: Training) -> None:
    for step in range(30):
        training.step(step)
    training.recorder.close()
    assert [path.name for path in (training.run_dir / "tail").iterdir() if path.suffix == ".log"] == []
    assert not list((training.run_dir / "tail").glob(".reserve*"))
    assert open_run(training.run_dir).table("steps", ["step"]).column("step").to_pylist() == list(range(30))


class OnDevice(Tensor):
    """A tensor that says it lies on a device, as far as a recorder looks."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("meta")


def on_device(value: float) -> Tensor:
    return torch.tensor(value).as_subclass(OnDevice)


def test_a_scalar_on_a_device_is_pending_until_it_is_fetched_and_then_is_what_it_was() -> None:
    scalars = Scalars(lambda _: None)
    value = on_device(1.5)
    assert np.float64(scalars.kept(3, "loss", value)).tobytes() == np.float64(PENDING).tobytes()
    value.add_(1.0)  # training goes on with it
    scalars.kept(4, "a", on_device(2.5))
    scalars.kept(4, "b", on_device(float("nan")))
    assert scalars.fetched(2) == {}
    assert scalars.fetched(3) == {3: {"loss": 1.5}}
    found = scalars.fetched(9)
    assert found.keys() == {4}
    assert found[4]["a"] == 2.5
    assert np.isnan(found[4]["b"])
    assert scalars.fetched(9) == {}
    assert np.float64(scalars.kept(5, "c", None)).tobytes() == np.float64(NULL).tobytes()


def test_scalars_on_a_device_are_complete_when_the_next_measured_step_returns(training: Training) -> None:
    for step in range(13):
        training.step(step, loss=on_device(step + 0.5), own=on_device(-step))
        rows = open_run(training.run_dir).table("steps", ["step", "loss", "own"]).to_pylist()
        assert [row["step"] for row in rows] == list(range(step + 1))
        complete = [{"step": done, "loss": done + 0.5, "own": -done} for done in range(step + 1)]
        for row, expected in zip(rows, complete, strict=True):
            # What was there when the last measured step but one was closed has been vouched for.
            if row["step"] <= step // 2 * 2 - 2:
                assert row == expected
            else:
                assert row["loss"] in (None, expected["loss"])


def test_the_tail_alone_holds_the_completed_rows_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "CADENCE", NEVER)
    training = Training(tmp_path / "run")
    for step in range(5):
        training.step(step, loss=on_device(step))
    training.recorder._on_worker(training.recorder._stream.absorb)
    tail = tmp_path / "run" / "tail"
    segments = [path.read_bytes() for path in sorted(tail.glob("steps-*.log"))]
    found = read_generation(segments, (tail / "rows-000000.log").read_bytes())
    assert found.tables["steps"].column("loss").to_pylist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert found.pending == set()
    training.recorder.close()


def test_the_summary_is_what_reading_the_tables_gives(training: Training) -> None:
    losses = [3.0, 1.0, float("inf"), 2.0, float("nan"), None]
    for step, loss in enumerate(losses):
        training.step(step, loss=loss)
    training.recorder.close()
    run = open_run(training.run_dir)
    summary = run.info["summary"]
    assert summary["last_loss"] == 2.0
    assert summary["lowest_entropy"] == pytest.approx(run.attention()["entropy"].min(), rel=1e-6)
    by_step = run.spectra().groupby("step")["sec_1"].mean()
    assert summary["highest_sec"] == pytest.approx(by_step.max(), rel=1e-6)
    assert summary["last_measured_step"] == 4


def test_going_back_on_a_live_recorder_is_a_new_attempt_that_replaces_the_steps_it_computes_again(
    training: Training,
) -> None:
    for step in range(6):
        training.step(step)
    saved = pickle.loads(pickle.dumps(training.recorder.state_dict()))  # noqa: S301 - its own
    for step in range(6, 13):
        training.step(step)
    training.recorder.load_state_dict(saved)
    for step in range(6, 10):
        training.step(step, loss=100.0 + step)
    shown = open_run(training.run_dir).table("steps", ["step", "loss"]).to_pylist()
    assert shown == [{"step": step, "loss": float(step) if step < 6 else 100.0 + step} for step in range(10)]
    training.recorder.close()
    first, both = open_run(training.run_dir, attempt=1), open_run(training.run_dir)
    assert first.table("steps", ["loss"]).column("loss").to_pylist() == [float(step) for step in range(13)]
    assert both.table("steps", ["step"]).column("step").to_pylist() == list(range(10))
    assert set(both.attention()["step"]) == {0, 2, 4, 6, 8}
    info = both.info
    assert (info["attempt"], info["steps"], info["state"]) == (2, 10, "finished")
    told = [(one["attempt"], one["first_step"], one["state"]) for one in info["attempts"]]
    assert told == [(1, 0, "finished"), (2, 6, "finished")]
    assert all(one["ended_s"] is not None for one in info["attempts"])


def test_a_step_alone_is_a_state_too(training: Training) -> None:
    training.recorder.load_state_dict({"step": 40})
    for step in range(40, 43):
        training.step(step)
    training.recorder.load_state_dict({"step": 41})
    training.step(41, loss=7.0)
    run = open_run(training.run_dir)
    assert run.table("steps", ["step", "loss"]).to_pylist() == [
        {"step": 40, "loss": 40.0},
        {"step": 41, "loss": 7.0},
    ]
    training.recorder.close()
    assert [one["first_step"] for one in run.info["attempts"]] == [40, 41]


def test_loading_a_state_before_the_first_step_is_no_new_attempt(training: Training) -> None:
    for step in (5, 3):
        training.recorder.load_state_dict({"step": step})
    training.step(3)
    training.recorder.close()
    info = open_run(training.run_dir).info
    assert [(one["attempt"], one["first_step"]) for one in info["attempts"]] == [(1, 3)]


def test_measurements_that_cannot_be_taken_in_time_are_left_out_told_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "CADENCE", NEVER)
    monkeypatch.setattr(background, "_SLOT_WAIT_S", 0.0)
    training = Training(tmp_path / "run")
    training.step(0)
    recorder = training.recorder
    recorder._on_worker(lambda: None)
    assert recorder._background._slot.acquire(timeout=10.0)  # as a writer that is still measuring holds it
    for step in range(1, 5):
        training.step(step)
    recorder._background._slot.release()
    for step in range(5, 8):
        training.step(step)
        recorder._on_worker(lambda: None)
    recorder.close()
    run = open_run(tmp_path / "run")
    assert run.info["thinned"] == {"measured_steps": 2, "last_step": 4}
    assert set(run.attention()["step"]) == {0, 6}
    told = run.events()
    assert told[told["kind"] == "warning"]["step"].tolist() == [2, 4]
    assert run.table("steps", ["step"]).num_rows == 8


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_that_steps_and_closes_leaves_the_parents_run_alone(training: Training) -> None:
    training.step(0)
    child = os.fork()
    if child == 0:
        # Whatever happens in here, no test of the parent's may go on in the child.
        try:
            for step in range(50):
                training.recorder.step(loss=-1.0 - step)
            training.recorder.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    for step in range(1, 4):
        training.step(step)
    losses = open_run(training.run_dir).table("steps", ["loss"]).column("loss").to_pylist()
    assert losses == [0.0, 1.0, 2.0, 3.0]


def test_a_state_of_a_recorder_that_switched_itself_off_is_there_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(tmp_path / "run")
    training.step(0)

    def faulty(*_: object) -> None:
        raise ZeroDivisionError("planted")

    def switch_off() -> None:
        training.recorder._on_worker(faulty)
        while not training.recorder._border.broken:
            time.sleep(0.001)

    with pytest.warns(UserWarning, match="planted"):
        switch_off()
    began_s = time.monotonic()
    assert training.recorder.state_dict()["step"] == 1
    assert time.monotonic() - began_s < background._JOB_WAIT_S / 2
    training.recorder.close()


def test_the_losses_between_measured_steps_are_framed_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer may find steps after a measured one before it has taken that one's measurements."""
    monkeypatch.setattr(stream, "CADENCE", NEVER)
    training = Training(tmp_path / "run", every=4)
    closed: list[list[int]] = []
    frames = training.recorder._stream._detection._frames
    original = frames.close

    def noted(step: int, *tables: Any, **kind: Any) -> Any:
        closed.append([at for at, _, _ in frames._rows])
        return original(step, *tables, **kind)

    monkeypatch.setattr(frames, "close", noted)
    for step in range(10):
        training.step(step)
    training.recorder.close()
    assert closed == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]
