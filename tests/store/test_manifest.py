"""run.json is replaced whole or not at all, and says of each attempt what held of it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from synthetic import manifest

from diagnostics.store.manifest import (
    begin_attempt,
    current_attempt,
    live_state,
    read_manifest,
    remove_stale_temporaries,
    write_atomically,
    write_manifest,
)


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new")
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("run.json", "old")]


def test_only_temporaries_of_the_same_file_by_other_processes_are_stale(tmp_path: Path) -> None:
    stay = [f".run.json.{os.getpid()}.tmp", ".other.json.7.tmp", ".run.json.x.tmp", "run.json"]
    for name in [*stay, ".run.json.7.tmp"]:
        (tmp_path / name).write_text("")
    remove_stale_temporaries(tmp_path / "run.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(stay)


def test_what_the_top_level_says_is_written_of_the_current_attempt_too(tmp_path: Path) -> None:
    told = manifest("run", state="running")
    begin_attempt(told, 2, before="crashed", started_s=5.0)
    told |= {"state": "finished", "error": None, "ended_s": 9.0}
    write_manifest(tmp_path, told)
    first, second = read_manifest(tmp_path)["attempts"]
    assert (first["state"], first["ended_s"]) == ("crashed", None)
    assert (second["state"], second["ended_s"], second["started_s"]) == ("finished", 9.0, 5.0)
    assert (second["pid"], second["attempt"]) == (os.getpid(), 2)


def test_a_manifest_without_a_list_of_attempts_speaks_for_itself(tmp_path: Path) -> None:
    for attempts in ([], None, "x", [3]):
        told = {**manifest("run"), "attempts": attempts}
        assert current_attempt(told) is told
        write_manifest(tmp_path, told)
        assert json.loads((tmp_path / "run.json").read_text())["attempts"] == attempts
        begin_attempt(told, 2, before="crashed", started_s=5.0)
        assert [each["attempt"] for each in told["attempts"]] == [2]


def test_a_process_that_was_killed_and_not_waited_for_is_dead() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        told = manifest("run", state="running", pid=child.pid, host=socket.gethostname())
        assert live_state(told) == "running"
        child.kill()
        # Leaves it to be waited for: until then its number still stands for a process.
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert live_state(told) == "crashed"
