import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from synthetic import manifest, write_run, write_table

from diagnostics.cli.watch import Followed, _follow, sparkline
from diagnostics.store.format import PartName
from diagnostics.store.manifest import write_manifest
from diagnostics.store.read import open_run

Command = Callable[..., Any]


def test_a_finished_run_is_shown_once_with_its_verdict(diagnostics: Command, tmp_path: Path) -> None:
    ended = diagnostics("watch", write_run(tmp_path, steps=100))
    assert (ended.code, ended.err) == (0, "")
    first, last = ended.out.splitlines()
    # The synthetic healthy run: entropy 3.52 nats, logits 1, sigma 1, .9, .8, .7, so SEC 1 / (1 + .81 + .64 + .49).
    assert first.startswith("step 99: loss 0.2")
    assert first.endswith("lowest entropy (nats) 3.52, mean SEC 0.3401, largest logit 1")
    assert last == "run: healthy at step 99"


def test_a_live_run_is_followed_until_it_ends(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, steps=20, state="running")
    alert = {
        "step": 30,
        "time_s": 0.0,
        "kind": "alert",
        "severity": "critical",
        "layer": "blocks.0.attn",
        "head": 1,
        "message": "entropy is falling",
        "data": json.dumps({"kind": "entropy-collapse"}),
    }

    def train_on(_: float) -> None:
        write_table(run, "steps", [{"step": 30, "time_s": 0.0, "loss": 0.5, "measured": True}], number=1)
        write_table(run, "events", [alert])
        write_manifest(run, manifest("run", steps=31))

    # The run goes on while the watcher sleeps between two looks.
    monkeypatch.setattr("diagnostics.cli.watch.time", SimpleNamespace(sleep=train_on))
    ended = diagnostics("watch", run)
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["step 19", "step 30"]
    expected = "alert: step 30: critical: entropy-collapse in blocks.0.attn, head 1: entropy is falling"
    assert [line for line in lines if line.startswith("alert")] == [expected]


def test_a_run_that_is_resumed_meanwhile_says_so_and_its_steps_are_shown_anew(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, steps=40, state="running")

    def resume(_: float) -> None:
        # The second attempt goes on from step 20 with another loss.
        rows = [{"step": step, "time_s": 0.0, "loss": 7.0, "measured": False} for step in range(20, 30)]
        path = write_table(run, "steps", rows, number=9)
        path.rename(path.with_name(str(PartName(20, 29, 9, attempt=2))))
        attempts = [
            {"attempt": 1, "first_step": 0, "state": "crashed"},
            {"attempt": 2, "first_step": 20, "state": "finished"},
        ]
        write_manifest(run, manifest("run", steps=30, attempt=2, attempts=attempts))

    monkeypatch.setattr("diagnostics.cli.watch.time", SimpleNamespace(sleep=resume))
    lines = diagnostics("watch", run).out.splitlines()
    assert lines[0].startswith("step 39: ")
    assert lines[1] == "attempt 2 resumed at step 20 (attempt 1: crashed)"
    assert lines[2].startswith("step 29: loss 7,")


def test_in_a_terminal_the_screen_holds_the_numbers_their_course_and_the_alerts(tmp_path: Path) -> None:
    screen = StringIO()
    run = write_run(tmp_path, "my-run", steps=100, collapse=True)
    _follow(Followed(open_run(run)), Console(file=screen, force_terminal=True, width=120, markup=False))
    shown = screen.getvalue()
    assert "my-run: finished, step 99" in shown
    assert "largest logit" in shown
    assert "█" in shown
    assert "entropy-collapse" in shown


def test_a_sparkline_spans_its_own_values_and_shows_gaps() -> None:
    assert sparkline({0: 0.0, 1: None, 2: 4.0, 3: math.nan, 4: 7.0}) == "▁ ▅!█"
    assert sparkline(dict.fromkeys(range(3), 2.5)) == "▁▁▁"
    assert sparkline({}) == ""
    assert len(sparkline({step: float(step) for step in range(1000)})) == 40


def test_ctrl_c_ends_it_quietly(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=20, state="running")
    child = subprocess.Popen(
        [sys.executable, "-m", "diagnostics", "watch", run],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdout is not None
    assert child.stdout.readline().startswith("step 19")
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert (child.returncode, err) == (0, "")


def test_a_path_that_is_no_run_gives_2(diagnostics: Command, tmp_path: Path) -> None:
    assert diagnostics("watch", tmp_path).code == 2
