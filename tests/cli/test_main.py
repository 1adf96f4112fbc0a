import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_run

import diagnostics as package

Command = Callable[..., Any]

VERBS = ("demo", "list", "report", "watch", "dashboard", "control", "export", "compact")


def test_the_version_is_the_packages(diagnostics: Command) -> None:
    ended = diagnostics("--version")
    assert (ended.code, ended.out) == (0, f"diagnostics {package.__version__}\n")


def test_without_a_verb_the_verbs_are_shown(diagnostics: Command) -> None:
    ended = diagnostics()
    assert ended.code == 2
    assert all(f"  {verb} " in ended.out + ended.err for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_in_whole_sentences(diagnostics: Command, verb: str) -> None:
    ended = diagnostics(verb, "--help")
    assert (ended.code, ended.err) == (0, "")
    assert f"Usage: diagnostics {verb}" in ended.out
    # The overview cuts a longer first sentence short.
    assert "..." not in diagnostics("--help").out.split("Commands:")[1]


def test_a_disk_that_refuses_is_one_line_and_2(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "run.json")

    monkeypatch.setattr("diagnostics.cli.report.assess", refuse)
    ended = diagnostics("report", write_run(tmp_path))
    assert (ended.code, ended.out) == (2, "")
    assert ended.err == "diagnostics: error: [Errno 13] Permission denied: 'run.json'\n"


def test_a_warning_is_one_line_on_stderr(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def warn(root: str) -> list[Path]:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn(f"look at\n  {Path(root).name}", stacklevel=1)
        return []

    monkeypatch.setattr("diagnostics.cli.list_runs.runs_below", warn)
    ended = diagnostics("list", tmp_path / "here", "--json")
    assert ended.err.splitlines()[0] == "diagnostics: warning: look at here"
    assert "look at" not in ended.out


@pytest.mark.parametrize("arguments", [["report"], ["report", "--json"], ["list"], ["list", "--json"]])
def test_a_reader_that_has_seen_enough_changes_no_verdict(tmp_path: Path, arguments: list[str]) -> None:
    # Long enough that Python writes before it ends: its buffer holds 8 kB.
    for number in range(60):
        write_run(tmp_path, f"{number}-{'long' * 40}", steps=1)
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "diagnostics", *arguments, tmp_path],
            check=False,
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(write_end)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_terminal_without_unicode_is_no_error(tmp_path: Path) -> None:
    write_run(tmp_path, "läuft")
    ended = subprocess.run(
        [sys.executable, "-m", "diagnostics", "list", tmp_path],
        check=False,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"l?uft" in ended.stdout


def test_ctrl_c_while_waiting_for_a_run_gives_130_without_a_traceback(tmp_path: Path) -> None:
    run = write_run(tmp_path, state="running")
    (run / "control" / "inbox").mkdir(parents=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "diagnostics", "control", run, "status"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    assert "waiting" in child.stderr.readline()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (130, "")
