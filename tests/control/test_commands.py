"""Commands from other processes: applied between two steps, answered in the journal and in the events."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from live_models import Small, batch
from torch import nn

from diagnostics.control.commands import COMMANDS, as_typed, check_command
from diagnostics.control.controller import Controller
from diagnostics.control.mailbox import acknowledgement, await_acknowledgement, read_journal, send
from diagnostics.errors import CommandError, NotARunError
from diagnostics.record.recorder import Recorder
from diagnostics.store.format import CONTROL_INBOX
from diagnostics.store.read import Run, open_run


class Loop:
    """A training loop that can be stepped by hand."""

    def __init__(self, run_dir: Path, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = Small()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.recorder = Recorder(self.model, self.optimizer, run_dir, **{"every": 1000, **options})
        self.run_dir, self.step_number = run_dir, 0

    def step(self) -> None:
        loss = self.model(batch(self.step_number)).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.recorder.step(loss=loss)
        self.step_number += 1

    def poll(self) -> None:
        """What the writer's thread does five times a second."""
        self.recorder._on_worker(self.recorder._stream.idle)

    def answer(self, identity: str) -> dict[str, Any]:
        self.poll()
        self.step()
        record = acknowledgement(self.run_dir, identity)
        assert record is not None
        return record

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        return self.answer(send(self.run_dir, command, arguments))

    def close(self) -> Run:
        self.recorder.close()
        run = open_run(self.run_dir)
        assert run.info["faults"] == []
        return run


def drop(run_dir: Path, name: str = "0-by-hand", **changes: Any) -> str:
    """A command file written by hand, as another program might."""
    record = {
        "id": name,
        "command": "spectral-bound",
        "arguments": {"tau": 0.5},
        "run_id": open_run(run_dir).info["run_id"],
        "expires_s": time.time() + 60.0,
        **changes,
    }
    path = run_dir / CONTROL_INBOX / f"{name}.json"
    path.write_text(json.dumps(record))
    os.utime(path, (time.time() - 60.0,) * 2)
    return name


def test_a_command_from_another_process_is_applied_between_two_steps_and_answered(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    loop.step()
    source = "import sys; from diagnostics.control.mailbox import send; print(send(sys.argv[1], 'spectral-bound', {'tau': 0.02}))"
    sent = subprocess.run(
        [sys.executable, "-c", source, str(loop.run_dir)], capture_output=True, text=True, check=True
    )
    deadline_s = time.monotonic() + 10.0
    while not loop.recorder._controller.waiting and time.monotonic() < deadline_s:
        time.sleep(0.02)  # the writer's thread looks by itself
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    assert loop.recorder.controller is not None
    assert loop.recorder.controller.armed == {}
    loop.step()
    # The command came while step 1 was under way: that step is as it was, the next one is bounded.
    assert loop.recorder.controller.armed["spectral-bound"]["tau"] == 0.02
    record = acknowledgement(loop.run_dir, sent.stdout.strip())
    assert record is not None
    assert (record["status"], record["step"], record["reason"]) == ("applied", 2, None)
    assert record["before"] == {"armed": False, "tau": None}
    assert record["after"]["tau"] == 0.02
    assert record["after"]["matrices"] == 10
    before = {name: p.detach().clone() for name, p in loop.model.named_parameters()}
    loop.step()
    name = "layers.1.linear1.weight"
    change = dict(loop.model.named_parameters())[name].detach() - before[name]
    assert torch.linalg.matrix_norm(change, 2) <= 0.02 * torch.linalg.matrix_norm(before[name], 2) * 1.001
    run = loop.close()
    event = run.events().iloc[0]
    assert (event["kind"], event["severity"], event["step"]) == ("control", "info", 2)
    assert event["message"] == "spectral-bound --tau 0.02 applied from step 2"
    assert json.loads(event["data"])["after"]["tau"] == 0.02
    assert not loop.optimizer._optimizer_step_post_hooks


def test_the_command_line_sends_and_shows_the_answer(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    process = subprocess.Popen(
        [sys.executable, "-m", "diagnostics", "control", str(loop.run_dir), "spectral-bound", "--tau", "0.05"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while process.poll() is None:
        loop.step()
        time.sleep(0.05)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "applied" in out
    assert loop.close().events()["kind"].tolist() == ["control"]


def test_arming_again_changes_tau_and_disarming_takes_the_bound_off(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    assert loop.ask("status")["after"] == {"mode": "suggest", "armed": {}}
    assert loop.ask("spectral-bound", tau=0.02)["status"] == "applied"
    again = loop.ask("spectral-bound", tau=0.03)
    assert (again["before"]["tau"], again["after"]["tau"]) == (0.02, 0.03)
    assert len(loop.optimizer._optimizer_step_post_hooks) == 1
    assert loop.ask("status")["after"]["armed"]["spectral-bound"]["tau"] == 0.03
    off = loop.ask("disarm", name="spectral-bound")
    assert (off["before"]["armed"], off["after"]) == (True, {"armed": False, "tau": None})
    assert not loop.optimizer._optimizer_step_post_hooks
    late = loop.ask("disarm", name="spectral-bound")
    assert (late["status"], late["reason"]) == (
        "rejected",
        "'spectral-bound' is not armed; armed now: nothing",
    )
    loop.close()


def test_an_infinite_tau_travels_and_is_applied(tmp_path: Path) -> None:
    """JSON has no infinity: it goes as text, and must come back as a number."""
    loop = Loop(tmp_path / "run")
    record = loop.ask("spectral-bound", tau=float("inf"))
    assert record["status"] == "applied"
    assert record["after"]["tau"] == "inf"
    loop.step()
    loop.close()


@pytest.mark.parametrize(
    ("command", "arguments"),
    [("lr-scale", {"factor": 0.5}), ("qk-clip", {"threshold": 9.0}), ("stop", {}), ("checkpoint", {})],
)
def test_a_command_that_this_run_cannot_carry_out_is_rejected_in_words(
    command: str, arguments: dict[str, Any], tmp_path: Path
) -> None:
    loop = Loop(tmp_path / "run")
    record = loop.ask(command, **arguments)
    assert record["status"] == "rejected"
    assert (
        record["reason"] == f"this run cannot carry out {command}; it knows spectral-bound, disarm and status"
    )
    assert loop.close().events()["severity"].tolist() == ["warning"]


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "another run": ({"run_id": "older"}, "rejected", "the command is for run older, this is run"),
    "too late": ({"expires_s": 1.0}, "expired", "had expired when the run reached a step boundary"),
    "expires never": ({"expires_s": float("nan")}, "expired", "had expired"),
    "unknown": (
        {"command": "explode"},
        "rejected",
        "there is no command 'explode'; the commands are spectral-bound",
    ),
    "a word for tau": (
        {"arguments": {"tau": "much"}},
        "rejected",
        "tau is 'much', it must be a number above 0",
    ),
    "negative tau": ({"arguments": {"tau": -1}}, "rejected", "tau is -1, it must be a number above 0"),
    "nothing to disarm": ({"command": "disarm", "arguments": {}}, "rejected", "disarm needs name"),
    "too much": ({"arguments": {"tau": 1, "now": 2}}, "rejected", "spectral-bound does not take 'now'"),
    "no arguments": ({"arguments": None}, "rejected", "is no command"),
    "a list": ({"arguments": [1]}, "rejected", "is no command"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_command_that_is_wrong_is_answered_in_words_and_changes_nothing(name: str, tmp_path: Path) -> None:
    changes, status, reason = WRONG[name]
    loop = Loop(tmp_path / "run")
    record = loop.answer(drop(loop.run_dir, **changes))
    assert record["status"] == status
    assert reason in record["reason"]
    assert not loop.optimizer._optimizer_step_post_hooks
    assert loop.ask("status")["status"] == "applied"  # the channel goes on
    assert list(loop.close().events()["severity"]) == ["warning", "info"]


def test_files_that_are_no_commands_are_refused_once_and_the_channel_goes_on(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    inbox = loop.run_dir / CONTROL_INBOX
    contents = {"a": "{half", "b": "[1, 2]", "c": "[" * 30_000, "d": "1" * 70_000, "e": ""}
    for name, content in contents.items():
        (inbox / f"{name}.json").write_text(content)
        os.utime(inbox / f"{name}.json", (time.time() - 60.0,) * 2)
    (inbox / "f.json").mkdir()
    (inbox / ".g.json.1.tmp").write_text("{")
    (inbox / "note.txt").write_text("hello")
    assert loop.ask("status")["status"] == "applied"
    loop.poll()
    refused = {record["id"]: record["status"] for record in read_journal(loop.run_dir)}
    assert {name: refused[name] for name in "abcdef"} == dict.fromkeys("abcdef", "rejected")
    assert len(loop.close().events()) == 7
    assert {path.name for path in inbox.iterdir()} == {".g.json.1.tmp", "note.txt", "f.refused"}


def test_a_file_still_in_the_writing_is_waited_for(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    name = drop(loop.run_dir)
    path = loop.run_dir / CONTROL_INBOX / f"{name}.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    loop.poll()
    loop.step()
    assert acknowledgement(loop.run_dir, name) is None
    path.write_text(whole)
    assert loop.answer(name)["status"] == "applied"
    loop.close()


def test_a_command_of_another_user_is_ignored_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path / "run")
    assert (loop.run_dir / CONTROL_INBOX).stat().st_mode & 0o777 == 0o700
    identity = send(loop.run_dir, "spectral-bound", {"tau": 0.1})
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    record = loop.answer(identity)
    assert record["status"] == "rejected"
    assert "belongs to user" in record["reason"]
    assert not loop.optimizer._optimizer_step_post_hooks
    loop.close()


def test_a_command_delivered_twice_counts_once(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    for name in ("1-first", "2-second"):
        drop(loop.run_dir, name, id="same")
        assert loop.answer("same")["status"] == "applied"
    records = [record for record in read_journal(loop.run_dir) if record["id"] == "same"]
    assert [record["status"] for record in records] == ["applied"]
    assert sum("came twice" in message for message in loop.close().events()["message"]) == 1


def test_commands_are_applied_in_the_order_of_sending(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    for tau in (0.1, 0.2, 0.3):
        send(loop.run_dir, "spectral-bound", {"tau": tau})
    loop.poll()
    loop.step()
    assert [record["after"]["tau"] for record in read_journal(loop.run_dir)] == [0.1, 0.2, 0.3]
    loop.close()


def test_without_a_channel_nothing_is_taken(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run", control="off")
    assert not (loop.run_dir / "control").exists()
    with pytest.raises(CommandError, match="started with control='off'"):
        send(loop.run_dir, "status")
    loop.close()


def test_an_observing_run_refuses_commands_in_words(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run", control="observe")
    record = loop.ask("spectral-bound", tau=0.1)
    assert record["status"] == "rejected"
    assert "control='observe': it takes no commands" in record["reason"]
    loop.close()


@pytest.mark.parametrize("mode", ["off", "observe", "suggest", "act"])
def test_the_runs_own_wish_is_written_down_or_carried_out_as_the_mode_says(mode: str, tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run", control=mode)
    controller = loop.recorder.controller
    assert controller is not None
    for _ in range(2):
        controller.propose("spectral-bound", {"tau": 0.04}, "entropy collapses in layer 3")
    loop.recorder._wake()
    loop.step()
    assert bool(controller.armed) == (mode == "act")
    events = loop.close().events()
    expected = {"off": [], "observe": [], "suggest": ["suggestion"], "act": ["control"]}
    assert events["kind"].tolist() == expected[mode]
    if mode == "suggest":
        assert (
            events["message"]
            .iloc[0]
            .endswith(f"diagnostics control {loop.run_dir} spectral-bound --tau 0.04")
        )


def test_without_an_optimizer_a_bound_is_refused_in_words(tmp_path: Path) -> None:
    model = Small()
    recorder = Recorder(model, run_dir=tmp_path / "run", every=1000)
    identity = send(tmp_path / "run", "spectral-bound", {"tau": 0.1})
    recorder._on_worker(recorder._stream.idle)
    model(batch(0)).sum().backward()
    recorder.step()
    record = acknowledgement(tmp_path / "run", identity)
    recorder.close()
    assert record is not None
    assert "no torch optimizer" in record["reason"]


def test_of_several_optimizers_those_with_matrices_are_bounded(tmp_path: Path) -> None:
    model = Small()
    vectors = torch.optim.SGD([p for p in model.parameters() if p.ndim < 2], lr=0.1)
    matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=0.1)
    with Recorder(model, [vectors, matrices], tmp_path / "run", every=1000) as recorder:
        assert recorder.controller is not None
        identity = send(tmp_path / "run", "spectral-bound", {"tau": 0.1})
        recorder._on_worker(recorder._stream.idle)
        model(batch(0)).sum().backward()
        recorder.step()
        record = acknowledgement(tmp_path / "run", identity)
        assert record is not None
        assert (record["status"], record["after"]["matrices"]) == ("applied", 10)
        state = recorder.state_dict()
        recorder.load_state_dict(state)
        assert len(matrices._optimizer_step_post_hooks) == 1
        assert not vectors._optimizer_step_post_hooks


def test_a_step_that_is_not_measured_looks_at_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Loop(tmp_path / "run")
    loop.step()
    looked: list[str] = []
    monkeypatch.setattr(Controller, "apply_waiting", lambda *_: looked.append("controller"))
    monkeypatch.setattr(loop.recorder, "_cross_boundary", lambda *_: looked.append("boundary"))
    for name in ("open", "stat", "glob", "read_text"):
        original = getattr(Path, name)

        def seen(*args: Any, _original: Any = original, **kwargs: Any) -> Any:
            import threading  # noqa: PLC0415 - beside its use

            if threading.current_thread() is threading.main_thread():
                looked.append("file")
            return _original(*args, **kwargs)

        monkeypatch.setattr(Path, name, seen)
    for _ in range(5):
        loop.step()
    assert looked == []
    monkeypatch.undo()
    loop.close()


def test_nothing_can_be_sent_to_a_run_that_has_ended_or_to_no_run(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run")
    with pytest.raises(CommandError, match="tau is 0"):
        send(loop.run_dir, "spectral-bound", {"tau": 0})
    loop.close()
    with pytest.raises(CommandError, match="is finished: commands reach live runs only"):
        send(loop.run_dir, "status")
    with pytest.raises(NotARunError):
        send(tmp_path, "status")


def test_an_answer_that_does_not_come_is_an_expiry_and_the_command_is_withdrawn(tmp_path: Path) -> None:
    loop = Loop(tmp_path / "run", control="observe")
    identity = send(loop.run_dir, "status")
    (path,) = (loop.run_dir / CONTROL_INBOX).iterdir()
    held = path.with_suffix(".held")
    path.rename(held)  # as if the run did not look
    record = await_acknowledgement(loop.run_dir, identity, timeout_s=0.2)
    assert record["status"] == "expired"
    assert "was withdrawn" in record["reason"]
    loop.close()


def test_the_vocabulary_is_the_contracts() -> None:
    assert {name: list(arguments) for name, arguments in COMMANDS.items()} == {
        "spectral-bound": ["tau"], "lr-scale": ["factor"], "qk-clip": ["threshold"], "disarm": ["name"],
        "checkpoint": [], "stop": [], "status": [],
    }  # fmt: skip
    assert check_command("spectral-bound", {"tau": "inf"}) == {"tau": float("inf")}
    assert as_typed("disarm", {"name": "spectral-bound"}) == "diagnostics control RUN disarm spectral-bound"
    assert (
        as_typed("lr-scale", {"factor": 0.5}, "runs/a") == "diagnostics control runs/a lr-scale --factor 0.5"
    )


def test_a_half_written_journal_line_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    (tmp_path / "control" / "journal.jsonl").write_text('{"id": "a", "status": "applied"}\n{"id": "b", "sta')
    assert read_journal(tmp_path) == [{"id": "a", "status": "applied"}]
    assert read_journal(tmp_path / "nowhere") == []


def test_the_bound_cuts_fused_projections_as_the_probe_found_them(tmp_path: Path) -> None:
    """Known only after the first measured step: the layer's name says nothing."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.out = nn.Linear(16, 48, bias=False), nn.Linear(16, 16, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in self.p(x).chunk(3, dim=-1))
            out: torch.Tensor = self.out(
                nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            )
            return out

    model = nn.ModuleDict({"odd_attention": Odd()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        model["odd_attention"](torch.randn(2, 5, 16)).sum().backward()
        optimizer.step()
        recorder.step()
        assert recorder.controller is not None
        _, after = recorder.controller._arm_bound(0.1)
    assert after["matrices"] == 4
