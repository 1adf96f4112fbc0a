import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_run

Command = Callable[..., Any]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=1) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_page_is_served_until_a_signal_ends_it_and_its_server(
    tmp_path: Path, number: signal.Signals
) -> None:
    write_run(tmp_path)
    port = free_port()
    child = subprocess.Popen(
        [sys.executable, "-m", "diagnostics", "dashboard", tmp_path, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        deadline_s = time.monotonic() + 60.0
        while not answers(port):
            assert child.poll() is None
            assert time.monotonic() < deadline_s
            time.sleep(0.2)
        child.send_signal(number)
        out, _ = child.communicate(timeout=30)
    finally:
        child.kill()
    assert child.returncode == 0
    assert f"dashboard on http://127.0.0.1:{port}" in out
    assert "Traceback" not in out
    # The server is a process of its own; it must not outlive the command.
    assert not answers(port)


def test_a_port_that_is_taken_gives_2_and_says_so(diagnostics: Command, tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        ended = diagnostics("dashboard", tmp_path, "--port", port)
    assert ended.code == 2
    assert f"cannot listen on 127.0.0.1:{port}" in ended.err
    assert "--port" in ended.err


def test_an_address_that_is_not_this_machines_gives_2(diagnostics: Command, tmp_path: Path) -> None:
    # 192.0.2.0/24 is set aside for documentation and belongs to no machine.
    ended = diagnostics("dashboard", tmp_path, "--host", "192.0.2.1")
    assert ended.code == 2
    assert "cannot listen on 192.0.2.1:8501" in ended.err


@pytest.mark.parametrize("port", ["0", "65536", "web"])
def test_an_impossible_port_gives_2(diagnostics: Command, tmp_path: Path, port: str) -> None:
    assert diagnostics("dashboard", tmp_path, "--port", port).code == 2


def test_a_root_that_is_no_directory_gives_2(diagnostics: Command, tmp_path: Path) -> None:
    ended = diagnostics("dashboard", tmp_path / "nowhere")
    assert ended.code == 2
    assert "is not a directory" in ended.err


def test_a_missing_streamlit_is_named(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diagnostics.cli.dashboard.find_spec", lambda _: None)
    ended = diagnostics("dashboard", tmp_path, "--port", free_port())
    assert ended.code == 2
    assert "pip install streamlit" in ended.err


@pytest.mark.parametrize(("host", "warned"), [("127.0.0.1", False), ("0.0.0.0", True)])  # noqa: S104 - what is tested
def test_control_for_other_machines_is_given_with_a_warning(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, host: str, *, warned: bool
) -> None:
    started: list[list[str]] = []

    def stay_with(command: list[str], environment: dict[str, str]) -> int:
        # In a checkout, Python must not take the folder ./diagnostics for the installed package.
        assert environment["PYTHONSAFEPATH"] == "1"
        started.append(command)
        return 0

    monkeypatch.setattr("diagnostics.cli.dashboard._stay_with", stay_with)
    ended = diagnostics("dashboard", tmp_path, "--host", host, "--port", free_port(), "--allow-control")
    assert ended.code == 0
    assert ("can steer the runs" in ended.err) is warned
    (command,) = started
    assert "--allow-control" in command
    assert host in command
