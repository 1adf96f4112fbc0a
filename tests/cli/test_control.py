import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_run

from diagnostics.control.mailbox import Command as Sent
from diagnostics.control.mailbox import take_commands, write_journal
from diagnostics.store.format import CONTROL_INBOX

Command = Callable[..., Any]


@contextmanager
def answering(run: Path, **answer: Any) -> Iterator[list[Sent]]:
    """A run's end of the channel, as far as a sender can see it: takes each command and journals an answer."""
    taken: list[Sent] = []
    ended = threading.Event()

    def loop() -> None:
        while not ended.wait(0.01):
            for sent in take_commands(run):
                assert isinstance(sent, Sent)
                taken.append(sent)
                record = {"step": 7, "reason": None, "before": None, "after": None, **answer}
                write_journal(run, {"id": sent.id, "command": sent.command, **record})

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield taken
    finally:
        ended.set()
        thread.join()


@pytest.fixture
def live_run(tmp_path: Path) -> Path:
    run = write_run(tmp_path, state="running", control="suggest")
    (run / CONTROL_INBOX).mkdir(parents=True)
    return run


def test_an_applied_command_gives_0_and_shows_what_changed(diagnostics: Command, live_run: Path) -> None:
    before, after = {"armed": False, "tau": None}, {"armed": True, "tau": 0.01}
    with answering(live_run, status="applied", before=before, after=after) as taken:
        ended = diagnostics("control", live_run, "spectral-bound", "--tau", "0.01")
    assert ended.code == 0
    assert ended.out.splitlines() == [
        "spectral-bound applied at step 7",
        "  armed: False -> True",
        "  tau: not observed -> 0.01",
    ]
    assert [(sent.command, sent.arguments) for sent in taken] == [("spectral-bound", {"tau": 0.01})]


def test_a_command_that_the_run_rejects_gives_1_and_the_runs_reason(
    diagnostics: Command, live_run: Path
) -> None:
    with answering(live_run, status="rejected", reason="this run cannot carry out lr-scale"):
        ended = diagnostics("control", live_run, "lr-scale", "--factor", "0.5")
    assert ended.code == 1
    assert ended.out == "lr-scale rejected at step 7: this run cannot carry out lr-scale\n"


def test_a_command_that_nobody_takes_expires_and_is_withdrawn(
    diagnostics: Command, live_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    defaults = "diagnostics.control.mailbox.await_acknowledgement.__defaults__"
    monkeypatch.setattr(defaults, (0.3,))
    ended = diagnostics("control", live_run, "status")
    assert ended.code == 1
    assert ended.out.startswith("status expired: ")
    assert list((live_run / CONTROL_INBOX).iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "arguments"),
    [
        (["spectral-bound", "--tau", "inf"], {"tau": float("inf")}),
        (["lr-scale", "--factor", "0.5"], {"factor": 0.5}),
        (["qk-clip", "--threshold", "100"], {"threshold": 100.0}),
        (["disarm", "spectral-bound"], {"name": "spectral-bound"}),
        (["checkpoint"], {}),
        (["stop"], {}),
        (["status"], {}),
    ],
)
def test_each_command_of_the_contract_reaches_the_run(
    diagnostics: Command, live_run: Path, typed: list[str], arguments: dict[str, Any]
) -> None:
    with answering(live_run, status="applied", before={}, after={"mode": "suggest"}) as taken:
        ended = diagnostics("control", live_run, *typed)
    assert ended.code == 0
    assert "mode: suggest" in ended.out
    (sent,) = taken
    assert sent.command == typed[0]
    # JSON has no infinity: it travels as a string that float() reads.
    assert {
        key: value if key == "name" else float(value) for key, value in sent.arguments.items()
    } == arguments


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["spectral-bound"], "spectral-bound needs --tau"),
        (["spectral-bound", "--tau", "-1"], "tau is -1.0"),
        (["spectral-bound", "--tau", "nan"], "tau is nan"),
        (["spectral-bound", "--tau", "much"], "'--tau'"),
        (
            ["spectral-bound", "--tau", "1", "--factor", "2"],
            "spectral-bound does not take --factor; it takes --tau",
        ),
        (["lr-scale", "--factor", "inf"], "factor is inf"),
        (["disarm"], "disarm needs NAME"),
        (["status", "now"], "status does not take NAME; it takes no arguments"),
        (["launch"], "there is no command 'launch'"),
        ([], "COMMAND"),
    ],
)
def test_a_malformed_command_gives_2_and_is_not_sent(
    diagnostics: Command, live_run: Path, typed: list[str], said: str
) -> None:
    ended = diagnostics("control", live_run, *typed)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert list((live_run / CONTROL_INBOX).iterdir()) == []


def test_a_run_that_has_ended_takes_no_command(diagnostics: Command, tmp_path: Path) -> None:
    ended = diagnostics("control", write_run(tmp_path), "status")
    assert ended.code == 2
    assert "is finished" in ended.err


def test_a_path_that_is_no_run_takes_no_command(diagnostics: Command, tmp_path: Path) -> None:
    ended = diagnostics("control", tmp_path, "status")
    assert ended.code == 2
    assert "holds no run.json" in ended.err
