"""Disks that are full, gone or read-only: one warning, training as if nothing were, and what was on record stays."""

import copy
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import Small, batch
from small_disk import fill, mounts, read_only, small_disk
from torch import nn

from diagnostics.errors import RecorderWarning
from diagnostics.record import stream
from diagnostics.record.recorder import Recorder
from diagnostics.record.stream import Cadence, Stream
from diagnostics.store import write
from diagnostics.store.coarse.tables import CoarseWriter
from diagnostics.store.read import open_run
from diagnostics.store.tail import step_log
from diagnostics.store.write import PartWriter

torch.set_num_threads(1)

BEFORE, AFTER = 8, 6
SEGMENT = 4096
HURRIED = Cadence(flush_after_s=0.05, flush_at_most_s=0.1, idle_s=0.01, segment_bytes=SEGMENT)
UNHURRIED = Cadence(idle_s=0.01, segment_bytes=SEGMENT)

Trouble = Callable[[Recorder], object]


@dataclass
class Lived:
    """A training that met trouble.

    Attributes:
        acknowledged: steps whose `recorder.step` had returned while nothing was wrong yet.
        messages: what the user was told.
    """

    acknowledged: list[int] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)


def live_through(run_dir: Path, trouble: Trouble, cadence: Cadence, most_s: float = 60.0) -> Lived:
    """Trains a while, lets trouble come, waits until it was met and trains on; training is checked for its bits."""
    torch.manual_seed(0)
    plain = Small()
    recorded = copy.deepcopy(plain)
    lived = Lived()
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        patch.setattr(stream, "CADENCE", cadence)
        warnings.simplefilter("always")
        optimizers = [torch.optim.SGD(model.parameters(), lr=1e-2) for model in (plain, recorded)]
        taken = 0
        with Recorder(recorded, optimizers[1], run_dir, every=1) as recorder:

            def step() -> None:
                nonlocal taken
                for model, optimizer in zip((recorded, plain), reversed(optimizers), strict=True):
                    torch.manual_seed(taken)
                    loss = one_step(model, optimizer, taken)
                    if model is recorded:
                        recorder.step(loss=loss, twice=2.0 * taken)
                        if not recorder._border.broken:
                            lived.acknowledged.append(taken)
                taken += 1

            for _ in range(BEFORE):
                step()
            trouble(recorder)
            deadline_s = time.monotonic() + most_s
            while not recorder._border.broken and time.monotonic() < deadline_s:
                step()
                time.sleep(0.005)
            assert recorder._border.broken, "the trouble was never met"
            for _ in range(AFTER):
                step()
    for ours, theirs in zip(recorded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not optimizers[1]._optimizer_step_pre_hooks
    lived.messages = [str(one.message) for one in caught if issubclass(one.category, RecorderWarning)]
    return lived


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    loss = model(batch(step)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.item())


def check_kept(run_dir: Path, lived: Lived) -> None:
    """Every acknowledged step is there once, and the measurements of all but the last of them."""
    run = open_run(run_dir)
    steps = run.steps()
    shown = steps["step"].tolist()
    assert len(shown) == len(set(shown))
    assert set(lived.acknowledged) <= set(shown)
    assert (steps["twice"] == 2.0 * steps["step"]).all()
    assert steps["loss"].notna().all()
    # A machine that is busy enough leaves measurements out, and says so.
    events = run.events()
    left_out = set(events[events["message"].str.contains("is lost: ")]["step"])
    for table in (run.attention(), run.spectra(), run.updates()):
        counts = table.groupby("step").size()
        assert set(lived.acknowledged[:-1]) - left_out <= set(counts.index)
        assert counts.nunique() == 1
    assert run.damaged == {}


def temporaries(run_dir: Path) -> list[str]:
    return [path.name for path in run_dir.rglob("*.tmp")]


def at_call(owner: Any, name: str, patch: pytest.MonkeyPatch, trouble: Callable[[], object]) -> None:
    """Has trouble come at the beginning of the next call of something, once."""
    original = getattr(owner, name)
    came: list[bool] = []

    def troubled(*arguments: Any, **named: Any) -> Any:
        if not came:
            came.append(True)
            trouble()
        return original(*arguments, **named)

    patch.setattr(owner, name, troubled)


MOMENTS: dict[str, tuple[Any, str, Cadence]] = {
    "in a segment": (step_log, "mapped", UNHURRIED),
    "in a frame of rows": (write._RowsLog, "append", UNHURRIED),
    "in a part": (PartWriter, "_write_part", HURRIED),
    "in a coarse part": (CoarseWriter, "write", HURRIED),
    "in run.json": (Stream, "write_manifest", UNHURRIED),
}


@pytest.mark.parametrize("moment", MOMENTS)
@mounts
def test_a_disk_that_is_full_costs_nothing_that_was_on_record(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    owner, name, cadence = MOMENTS[moment]
    with small_disk(tmp_path / "disk", 4096) as disk:

        def trouble(recorder: Recorder) -> None:
            at_call(owner, name, monkeypatch, lambda: fill(disk))

        lived = live_through(disk / "run", trouble, cadence)
        assert len(lived.messages) == 1
        assert "No space left on device" in lived.messages[0]
        assert "training goes on untouched" in lived.messages[0]
        # As the disk is, full, and once there is room again.
        check_kept(disk / "run", lived)
        assert temporaries(disk / "run") == []
        info = open_run(disk / "run").info
        assert "No space left on device" in info["faults"][0]["error"]
        (disk / "ballast").unlink()
        with Recorder(Small(), run_dir=disk / "run"):
            pass
        check_kept_by_parts(disk / "run", lived)


def check_kept_by_parts(run_dir: Path, lived: Lived) -> None:
    """What was in the tail is in parts once another attempt has begun."""
    assert not list((run_dir / "tail").glob("*.log"))
    steps = open_run(run_dir, attempt=1).steps()["step"].tolist()
    assert set(lived.acknowledged) <= set(steps)
    assert len(steps) == len(set(steps))


@mounts
def test_a_disk_too_full_for_the_next_segment_is_met_by_the_training_thread_too(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The writer's thread sleeps here, so that nothing makes a segment ahead."""
    asleep = Cadence(idle_s=3600.0, segment_bytes=SEGMENT)
    with small_disk(tmp_path / "disk", 4096) as disk:
        lived = live_through(disk / "run", lambda _: fill(disk), asleep)
        assert len(lived.messages) == 1
        assert "No space left on device" in lived.messages[0]
        check_kept(disk / "run", lived)


def test_a_directory_that_vanishes_is_told_once(tmp_path: Path) -> None:
    def vanish(recorder: Recorder) -> None:
        # First from its place: what is still being written into it would keep it from being removed.
        shutil.rmtree((tmp_path / "run").rename(tmp_path / "elsewhere"), ignore_errors=True)

    lived = live_through(tmp_path / "run", vanish, HURRIED)
    assert len(lived.messages) == 1
    assert "FileNotFoundError" in lived.messages[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("part", [".", "steps", "tail", "coarse"])
@mounts
def test_a_disk_that_becomes_read_only_costs_nothing_that_was_on_record(
    part: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with small_disk(tmp_path / "disk", 8192) as disk, ExitStack() as mounted:
        run_dir = disk / "run"

        def trouble(recorder: Recorder) -> None:
            mounted.enter_context(read_only(run_dir / part))

        lived = live_through(run_dir, trouble, HURRIED)
        assert len(lived.messages) == 1
        assert "Read-only file system" in lived.messages[0]
        check_kept(run_dir, lived)
        if part != ".":
            assert temporaries(run_dir) == []
            assert "Read-only file system" in open_run(run_dir).info["faults"][0]["error"]
