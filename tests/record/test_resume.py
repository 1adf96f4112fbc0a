"""Recording into a directory that holds a run: another attempt where nobody records it, refused where somebody does."""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from live_models import Small, batch
from synthetic import manifest, write_run
from torch.nn.modules import module as module_hooks

from diagnostics.attach.site import Sites
from diagnostics.errors import DiagnosticsError, NewerSchemaError, RecorderWarning, RunExistsError
from diagnostics.record import recorder as recorder_module
from diagnostics.record.claim import Claim, claim_run_dir
from diagnostics.record.recorder import Recorder
from diagnostics.store.manifest import live_state, read_manifest
from diagnostics.store.read import open_run

SAMPLES = Path(__file__).resolve().parents[2] / "sample_runs"

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def train(model: Small, recorder: Recorder, steps: range, offset: float = 0.0) -> None:
    """Steps whose loss is their number and an offset; the first of a run, which is measured, has a forward."""
    for step in steps:
        if step == 0:
            model(batch(0)).sum().backward()
        recorder.step(loss=step + offset)


def record(run_dir: Path, steps: range, offset: float = 0.0, **options: Any) -> None:
    """Records these steps as one attempt."""
    model = Small()
    with Recorder(model, run_dir=run_dir, **{"every": 1000, **options}) as recorder:
        if steps:
            recorder.load_state_dict({"step": steps[0], "control": {}})
        train(model, recorder, steps, offset)


CHILD = textwrap.dedent(
    """
    import os, sys, time
    from live_models import Small, batch
    from diagnostics import Recorder
    model = Small()
    recorder = Recorder(model, run_dir=sys.argv[1], every=1000)
    model(batch(0)).sum().backward()
    for step in range(int(sys.argv[2])):
        recorder.step(loss=float(step))
    print(os.getpid(), flush=True)
    time.sleep(60)
    """
)


@contextmanager
def recording(run_dir: Path, steps: int = 5) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has recorded so many steps and lives until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(run_dir), str(steps)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == f"{process.pid}\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def killed(run_dir: Path, steps: int = 5) -> None:
    """Records so many steps in a process that is killed right after the last."""
    pid = os.fork()
    if pid == 0:
        try:
            model = Small()
            train(model, Recorder(model, run_dir=run_dir, every=1000), range(steps))
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def losses(run_dir: Path, **view: int) -> dict[int, float]:
    frame = open_run(run_dir, **view).steps()
    assert frame["step"].is_unique
    return dict(zip(frame["step"], frame["loss"], strict=True))


# --- attempts -----------------------------------------------------------------------------------------


def test_a_resumed_run_replaces_the_steps_it_computes_again_and_keeps_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    record(run_dir, range(8))
    before = read_manifest(run_dir)
    with caplog.at_level("INFO", "diagnostics"):
        record(run_dir, range(5, 7), 100.0, config={"lr": 2})
    assert (
        f"{run_dir} holds a run of 8 steps (finished): recording attempt 2 into it; steps recorded "
        "again replace the old ones for readers, both stay on disk"
    ) in caplog.messages
    assert losses(run_dir) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 4, 5: 105, 6: 106}
    assert losses(run_dir, attempt=1) == {step: step for step in range(8)}
    assert losses(run_dir, attempt=2) == {5: 105, 6: 106}
    info = open_run(run_dir).info
    assert (info["run_id"], info["started_s"]) == (before["run_id"], before["started_s"])
    assert (info["attempt"], info["steps"], info["state"]) == (2, 7, "finished")
    told = [(each["attempt"], each["first_step"], each["state"], each["config"]) for each in info["attempts"]]
    assert told == [(1, 0, "finished", {}), (2, 5, "finished", {"lr": 2})]
    assert (
        info["attempts"][0]["ended_s"] <= info["attempts"][1]["started_s"] <= info["attempts"][1]["ended_s"]
    )


def test_a_killed_runs_tail_becomes_parts_and_it_counts_as_crashed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed(tmp_path, 5)
    assert live_state(read_manifest(tmp_path)) == "crashed"
    assert losses(tmp_path) == {step: step for step in range(5)}
    model = Small()
    with caplog.at_level("INFO", "diagnostics"), Recorder(model, run_dir=tmp_path, every=1000) as recorder:
        assert "holds a run of 5 steps (crashed): recording attempt 2" in caplog.text
        info = open_run(tmp_path).info
        assert (info["state"], info["pid"]) == ("running", os.getpid())
        assert [each["state"] for each in info["attempts"]] == ["crashed", "running"]
        # An attempt without a step hides nothing.
        assert losses(tmp_path) == {step: step for step in range(5)}
        recorder.load_state_dict({"step": 4, "control": {}})
        train(model, recorder, range(4, 6), 100.0)
        assert losses(tmp_path) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 104, 5: 105}
    assert losses(tmp_path) == {0: 0, 1: 1, 2: 2, 3: 3, 4: 104, 5: 105}
    info = open_run(tmp_path).info
    assert [each["first_step"] for each in info["attempts"]] == [0, 4]
    assert not list((tmp_path / "tail").glob("*.log"))


def test_a_run_that_is_killed_again_and_again_keeps_every_attempt(tmp_path: Path) -> None:
    for steps in (6, 2, 4):
        killed(tmp_path, steps)
    record(tmp_path, range(3, 5), 100.0)
    assert losses(tmp_path) == {0: 0, 1: 1, 2: 2, 3: 103, 4: 104}
    counts = [len(losses(tmp_path, attempt=attempt)) for attempt in (1, 2, 3, 4)]
    assert counts == [6, 2, 4, 2]
    numbers = [path.name.split("-")[3].split(".")[0] for path in (tmp_path / "steps").iterdir()]
    assert len({number.partition("a")[0] for number in numbers}) == len(numbers) == 4


def test_a_training_resumed_from_a_checkpoint_carries_on_in_the_same_directory(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def go_on(recorder: Recorder, steps: range) -> None:
        for step in steps:
            loss = model(batch(step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss=loss)

    with Recorder(model, optimizer, tmp_path, every=2) as recorder:
        go_on(recorder, range(4))
        state = recorder.state_dict()
        go_on(recorder, range(4, 7))
    with Recorder(model, optimizer, tmp_path, every=2) as recorder:
        recorder.load_state_dict(state)
        go_on(recorder, range(4, 9))
    run = open_run(tmp_path)
    assert list(run.steps()["step"]) == list(range(9))
    for table in (run.attention(), run.spectra(), run.updates()):
        assert sorted(set(table["step"])) == [0, 2, 4, 6, 8]
        keys = [name for name in ("step", "layer", "head", "parameter") if name in table]
        assert not table.duplicated(keys).any()
    assert list(open_run(tmp_path, attempt=1).steps()["step"]) == list(range(7))
    assert run.info["faults"] == []


def test_a_run_of_an_older_release_is_carried_on(tmp_path: Path) -> None:
    sample = min(path.parent for path in SAMPLES.glob("*/run.json"))
    run_dir = tmp_path / "run"
    shutil.copytree(sample, run_dir)
    before = open_run(run_dir)
    old_steps, old_events, info = before.steps(), before.events(), before.info
    record(run_dir, range(len(old_steps), len(old_steps) + 3))
    after = open_run(run_dir)
    pd.testing.assert_frame_equal(after.steps(end_step=len(old_steps) - 1), old_steps)
    assert len(after.steps()) == len(old_steps) + 3
    pd.testing.assert_frame_equal(after.events().head(len(old_events)), old_events)
    written = json.loads((run_dir / "run.json").read_text())
    assert (written["schema_version"], written["run_id"]) == (2, info["run_id"])
    firsts = [(each["attempt"], each["first_step"]) for each in written["attempts"]]
    assert firsts == [(1, 0), (2, len(old_steps))]


def test_faults_stay_with_the_attempt_that_met_them(tmp_path: Path) -> None:
    fault = {"where": "recorder", "error": "OSError: disk", "trace": ""}
    write_run(tmp_path, "run", steps=4, state="crashed", faults=[fault])
    record(tmp_path / "run", range(4, 5))
    info = open_run(tmp_path / "run").info
    assert info["faults"] == []
    assert info["attempts"][0]["faults"] == [fault]


def test_where_no_logging_is_set_up_the_user_is_told_on_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, range(3))
    monkeypatch.setattr(logging.getLogger("diagnostics"), "hasHandlers", lambda: False)
    record(tmp_path, range(3, 4))
    assert f"diagnostics: {tmp_path} holds a run of 3 steps (finished): recording" in capsys.readouterr().err


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)


@pytest.mark.usefixtures("no_locks")
def test_on_a_file_system_without_locks_a_run_is_made_refused_while_it_lives_and_carried_on(
    tmp_path: Path,
) -> None:
    record(tmp_path / "new", range(2))
    record(tmp_path / "new", range(1, 3), 100.0)
    assert losses(tmp_path / "new") == {0: 0, 1: 101, 2: 102}
    with recording(tmp_path / "run") as other:
        with pytest.raises(RunExistsError, match=f"process {other.pid} on"):
            Recorder(Small(), run_dir=tmp_path / "run")
        # Neither word of the lock file nor a heartbeat: the process alone speaks for the run.
        (tmp_path / "run" / "tail" / ".writer-0.lock").write_text("")
        with pytest.raises(RunExistsError, match=f"process {other.pid} on .*last sign of life"):
            Recorder(Small(), run_dir=tmp_path / "run")
    record(tmp_path / "run", range(4, 6), 100.0)
    assert losses(tmp_path / "run") == {0: 0, 1: 1, 2: 2, 3: 3, 4: 104, 5: 105}


# --- refused ------------------------------------------------------------------------------------------


def test_a_run_that_another_process_records_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    with recording(tmp_path) as other:
        expected = (
            rf"recorded by process {other.pid} on {socket.gethostname()}; end that process, or give another"
        )
        with pytest.raises(RunExistsError, match=expected):
            Recorder(Small(), run_dir=tmp_path)
        info = read_manifest(tmp_path)
        assert (info["attempt"], info["pid"], info["state"]) == (1, other.pid, "running")
    assert losses(tmp_path) == {step: step for step in range(5)}


def test_a_second_recorder_of_this_process_is_refused_until_the_first_is_closed(tmp_path: Path) -> None:
    model = Small()
    with Recorder(model, run_dir=tmp_path, every=1000) as first:
        with pytest.raises(
            RunExistsError, match=r"this process .* records into .* already; close\(\) that Recorder"
        ):
            Recorder(Small(), run_dir=tmp_path)
        train(model, first, range(2))
    record(tmp_path, range(2, 3))
    assert losses(tmp_path) == {0: 0, 1: 1, 2: 2}


def test_of_two_processes_that_start_at_once_one_records_and_the_other_is_told(tmp_path: Path) -> None:
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD.replace("time.sleep(60)", "time.sleep(2)"), str(tmp_path), "3"],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in starters]
    assert sorted(process.returncode for process in starters) == [0, 1]
    refused = next(error for error, process in zip(errors, starters, strict=True) if process.returncode)
    assert "RunExistsError" in refused
    assert losses(tmp_path) == {0: 0, 1: 1, 2: 2}


ELSEWHERE: dict[str, Any] = {"state": "running", "host": "another-node", "pid": 77, "steps": 3}


def test_a_run_on_another_host_counts_as_live_while_its_heartbeat_is_fresh(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", **{**ELSEWHERE, "steps": 3, "heartbeat_s": time.time() - 12})
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(
        RunExistsError, match=r"process 77 on another-node \(running, last sign of life 12 s ago\)"
    ):
        Recorder(Small(), run_dir=run_dir)
    assert sorted(run_dir.rglob("*")) == before
    (run_dir / "run.json").write_text(json.dumps(manifest("run", **ELSEWHERE, heartbeat_s=time.time() - 31)))
    record(run_dir, range(3, 4))
    assert open_run(run_dir).info["attempts"][0]["state"] == "crashed"


def test_a_live_run_of_an_older_release_which_knew_no_lock_is_refused(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        run_dir = write_run(tmp_path, "run", steps=3, schema_version=1, state="running", pid=other.pid)
        with pytest.raises(RunExistsError, match=f"process {other.pid} on {socket.gethostname()}"):
            Recorder(Small(), run_dir=run_dir)
        assert not (run_dir / "tail").exists()
        other.kill()
    record(run_dir, range(3, 4))
    assert open_run(run_dir).info["attempt"] == 2


def test_the_lock_says_more_than_a_pid_that_was_given_to_another_process(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path, "run", steps=3, state="running", pid=os.getppid())
    record(run_dir, range(3, 4))
    assert open_run(run_dir).info["attempts"][0]["state"] == "crashed"


def test_a_run_of_a_newer_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"schema_version": 99}')
    with pytest.raises(NewerSchemaError, match="schema version 99"):
        Recorder(Small(), run_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_json_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"job": 3}')
    with pytest.raises(DiagnosticsError, match="not be a recorder's: move it away, or give another run_dir"):
        Recorder(Small(), run_dir=tmp_path)
    assert (tmp_path / "run.json").read_text() == '{"job": 3}'


# --- run.json lost ------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b'{"schema_ver', b"\0" * 100, b"[]"])
def test_a_damaged_run_json_is_kept_and_the_tables_are_carried_on(content: bytes, tmp_path: Path) -> None:
    record(tmp_path, range(4))
    killed(tmp_path, 3)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.warns(
        RecorderWarning, match=r"run\.json is (damaged|missing).*the tables beside it are kept"
    ):
        record(tmp_path, range(2, 5), 100.0)
    assert losses(tmp_path) == {0: 0, 1: 1, 2: 102, 3: 103, 4: 104}
    assert losses(tmp_path, attempt=1) == {step: step for step in range(4)}
    info = open_run(tmp_path).info
    assert [(each["attempt"], each["first_step"], each["state"]) for each in info["attempts"]] == [
        (1, 0, "crashed"),
        (2, 0, "crashed"),
        (3, 2, "finished"),
    ]
    assert (info["started_s"], info["steps"]) == (None, 5)
    kept = tmp_path / "run.json.damaged"
    assert kept.read_bytes() == content if content else not kept.exists()
    events = open_run(tmp_path).events()
    assert events[events["kind"] == "warning"]["message"].str.contains("tables beside it").sum() == 1


def test_two_damaged_ones_are_both_kept(tmp_path: Path) -> None:
    for content in ("{1", "{2"):
        record(tmp_path, range(2))
        (tmp_path / "run.json").write_text(content)
        with pytest.warns(RecorderWarning, match="is damaged"):
            record(tmp_path, range(2))
    assert (tmp_path / "run.json.damaged").read_text() == "{1"
    assert (tmp_path / "run.json.damaged-2").read_text() == "{2"


def test_an_empty_run_json_without_tables_is_a_start_that_was_cut_short(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("mine")
    record(tmp_path, range(2))
    info = open_run(tmp_path).info
    assert (info["attempt"], len(info["attempts"])) == (1, 1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def claim(run_dir: Path) -> Claim:
    return claim_run_dir(run_dir, model=Small(), config=None, every=1000, control="off", sites=Sites())


def test_a_claim_that_is_killed_at_any_operation_loses_nothing_and_the_next_one_goes_on(
    tmp_path: Path,
) -> None:
    original = tmp_path / "original"
    record(original, range(3))
    killed(original, 5)
    operation, died = 0, True
    while died:
        run_dir = tmp_path / f"killed-{operation}"
        shutil.copytree(original, run_dir)
        died = killed_at(operation, run_dir, claim)
        assert losses(run_dir) == {step: step for step in range(5)}, f"operation {operation}"
        again = claim(run_dir)
        again.release()
        # One attempt more, or two where the killed one had got as far as run.json.
        assert again.attempt in (3, 4)
        assert [each["state"] for each in again.manifest["attempts"]][-3:-1] == [
            "finished" if again.attempt == 3 else "crashed",
            "crashed",
        ]
        assert losses(run_dir) == {step: step for step in range(5)}, f"operation {operation}"
        assert losses(run_dir, attempt=1) == {step: step for step in range(3)}
        assert not list(run_dir.rglob("*.tmp"))
        shutil.rmtree(run_dir)
        operation += 1
    # Read run.json, hold, settle a part and its files, write run.json.
    assert operation > 10


def test_a_first_claim_that_is_killed_at_any_operation_can_be_made_again(tmp_path: Path) -> None:
    operation, died = 0, True
    while died:
        run_dir = tmp_path / f"killed-{operation}" / "run"
        died = killed_at(operation, run_dir, claim)
        record(run_dir, range(2))
        assert losses(run_dir) == {0: 0, 1: 1}
        assert [path.name for path in run_dir.glob("run.json*")] == ["run.json"]
        operation += 1
    assert operation > 8


def killed_at(operation: int, run_dir: Path, job: Callable[[Path], object]) -> bool:
    """Runs a job in a forked process that dies at its so-manieth operation on files of a run; whether it died."""

    def count(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal operation
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.listdir", "os.scandir") and str(
            run_dir
        ) in str(arguments[0]):
            operation -= 1
            if operation < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            sys.addaudithook(count)
            job(run_dir)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


# --- order and traces ---------------------------------------------------------------------------------


def test_temporaries_of_the_dead_are_removed(tmp_path: Path) -> None:
    record(tmp_path, range(2))
    for name in (".run.json.999999.tmp", "steps/.part-000000000000-000000000001-000007.parquet.tmp"):
        (tmp_path / name).write_text("half")
    record(tmp_path, range(2, 3))
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize("before", ["nothing", "a run"])
@pytest.mark.parametrize("failing", ["Stream", "Controller", "Background", "Uploading"])
def test_a_recorder_that_does_not_come_to_be_leaves_the_directory_as_it_was(
    before: str, failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    if before == "a run":
        record(run_dir, range(3))
        content = (run_dir / "run.json").read_bytes()

    def faulty(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(recorder_module, failing, faulty)
        with pytest.raises(OSError, match="No space left"):
            Recorder(Small(), run_dir=run_dir)
    if before == "a run":
        assert (run_dir / "run.json").read_bytes() == content
        assert not list((run_dir / "tail").glob("*.log"))
    else:
        assert not run_dir.exists()
    assert not module_hooks._global_forward_hooks
    assert not [thread for thread in threading.enumerate() if thread.name == "diagnostics-writer"]
    # And the directory is free again, for other processes and for this one.
    killed(run_dir, 2)
    record(run_dir, range(2, 4))
    assert len(losses(run_dir)) == 4


def test_a_forked_worker_neither_closes_nor_frees_the_run(tmp_path: Path) -> None:
    model = Small()
    with Recorder(model, run_dir=tmp_path, every=1000) as recorder:
        train(model, recorder, range(2))
        pid = os.fork()
        if pid == 0:
            recorder.close()
            os._exit(0)
        os.waitpid(pid, 0)
        code = "import sys; from pathlib import Path; from diagnostics.store.lock import hold; hold(Path(sys.argv[1]))"
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True
        )
        assert f"recorded by process {os.getpid()}" in other.stderr
        train(model, recorder, range(2, 3))
    assert losses(tmp_path) == {0: 0, 1: 1, 2: 2}


def test_a_resumed_run_that_has_made_no_step_yet_is_not_stalled(tmp_path: Path) -> None:
    """Its last step is that of the attempt before, days ago."""
    now_s = time.time()
    long_ago_s = now_s - 1e6
    told = manifest("run", state="running", steps=500, started_s=long_ago_s, last_step_s=long_ago_s + 100.0)
    attempts = [{**told["attempts"][0], "state": "crashed", "first_step": 0}]
    attempts += [
        {**attempts[0], "attempt": 2, "state": "running", "first_step": None, "started_s": now_s - 5.0}
    ]
    told |= {"attempt": 2, "attempts": attempts}
    assert live_state(told) == "running"
    # Two steps of a second each, and then none for ten minutes.
    attempts[1] |= {"first_step": 498, "started_s": now_s - 602.0}
    assert live_state({**told, "last_step_s": now_s - 600.0}) == "stalled"
