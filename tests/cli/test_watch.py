import json
import math
import os
import pty
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

from diagnostics.cli.follow import Followed
from diagnostics.cli.sparkline import sparkline
from diagnostics.cli.watch import follow
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


def shown_in_a_terminal(run: Path, width: int = 120, **how: Any) -> str:
    """The picture that stays on the screen once the run has ended, after what was drawn meanwhile."""
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=width, height=40, markup=False, **how)
    follow(Followed(open_run(run)), console, run)
    return screen.getvalue().rpartition("\x1b[?1049l")[2]


def test_in_a_terminal_the_screen_holds_the_numbers_their_course_and_the_alerts(tmp_path: Path) -> None:
    run = write_run(tmp_path, "my-run", steps=100, collapse=True, status="collapsed")
    shown = shown_in_a_terminal(run, color_system=None)
    # The synthetic run takes a second a step.
    assert "my-run: finished, step 99, 1 steps/s" in shown
    for label in ("loss", "lowest entropy (nats)", "mean SEC", "largest logit", "gradient norm"):
        assert any(line.startswith(label) for line in shown.splitlines())
    # At step 90 of 99: 0.909 of the way, bad is (0.909 - 0.3) / 0.7 = 0.87; sigma 1 + 30 bad, at step 40 it was 5.459.
    assert "max logit 131.5, sigma1 27.1 (x4.97 in 50 steps)" in shown
    assert "status" in shown
    assert "collapsed" in shown
    assert "█" in shown
    assert "step 50  critical  entropy-collapse in blocks.0.attn, head 1" in shown
    assert "attention entropy is collapsing" in shown
    assert f"diagnostics report {run}" in "".join(shown.split("\n")).replace("  ", "")


def test_a_narrow_terminal_gets_lines_that_fit_it(tmp_path: Path) -> None:
    run = write_run(tmp_path, "r", steps=3000, every=50, collapse=True, status="collapsed")
    shown = shown_in_a_terminal(run, width=60, color_system=None)
    assert max(map(len, shown.splitlines())) <= 60
    assert "largest logit" in shown


def test_the_screen_has_no_colour_where_none_is_wanted_and_colours_an_alert_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path, steps=40, collapse=True, status="collapsed")
    red = "\x1b[31m"
    assert f"{red}critical" in shown_in_a_terminal(run, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert red not in shown_in_a_terminal(run)


def test_the_screen_tells_the_forecast_of_the_run_and_the_command_of_its_newest_alert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = "arm the bound, `diagnostics control RUN spectral-bound --tau 0.01`"
    run = write_run(
        tmp_path,
        steps=21,
        state="running",
        status="at-risk",
        forecast={"steps_to_collapse": 120.0, "low": 80.0, "high": 200.0, "confidence": 0.8},
    )
    alert = {
        "step": 20,
        "time_s": 0.0,
        "kind": "alert",
        "severity": "warning",
        "layer": None,
        "head": None,
        "message": "logits grow",
        "data": json.dumps({"kind": "logit-growth", "advice": advice}),
    }
    write_table(run, "events", [alert])
    drawn = []

    class EnoughError(Exception):
        pass

    def stop(_: float) -> None:
        drawn.append(screen.getvalue())
        raise EnoughError

    monkeypatch.setattr("diagnostics.cli.watch.time", SimpleNamespace(sleep=stop))
    screen = StringIO()
    console = Console(file=screen, force_terminal=True, width=150, height=40, color_system=None)
    with pytest.raises(EnoughError):
        follow(Followed(open_run(run)), console, "runs/my run")
    (picture,) = drawn
    assert "running, step 20" in picture
    # A second a step; the last measured step is 20.
    assert "collapse in about 120 steps (80 to 200), 80 % sure: step ~140, 2 min from now" in picture
    assert "at risk" in picture
    assert "diagnostics control 'runs/my run' spectral-bound --tau 0.01" in picture


def test_a_run_without_attention_is_watched_by_its_loss(tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=30, every=1000)
    for table in ("attention", "spectra", "updates"):
        for part in (run / table).iterdir():
            part.unlink()
    shown = shown_in_a_terminal(run, color_system=None)
    assert "step 29" in shown
    assert "worst head" not in shown


def test_a_sparkline_spans_its_own_values_and_shows_gaps() -> None:
    assert sparkline({0: 0.0, 1: None, 2: 4.0, 3: math.nan, 4: 7.0}) == "▁ ▅!█"
    assert sparkline(dict.fromkeys(range(3), 2.5)) == "▁▁▁"
    assert sparkline({}) == ""
    assert len(sparkline({step: float(step) for step in range(1000)})) == 40


def test_a_long_series_keeps_what_matters_of_each_stretch_of_its_sparkline() -> None:
    # Ten bars of ten steps each: one low value among 99 high ones, in the fourth.
    series: dict[int, float | None] = dict.fromkeys(range(100), 8.0)
    series[35] = 1.0
    assert sparkline(series, 10, "min") == "███▁██████"
    assert sparkline(series, 10, "max") == "▁" * 10
    series[70] = math.inf
    assert sparkline(series, 10, "min") == "███▁███!██"


def test_series_of_different_spacing_share_an_axis_and_a_value_stands_until_the_next_is_due() -> None:
    every_fourth = {0: 0.0, 4: 7.0, 8: 0.0, 12: 7.0}
    assert sparkline(every_fourth, 16, "max", (0, 15)) == "▁▁▁▁████▁▁▁▁████"
    # The value due at step 12 is not there, and neither is anything after it.
    assert sparkline({0: 0.0, 4: 7.0, 8: 0.0}, 20, "max", (0, 19)) == "▁▁▁▁████▁▁▁▁        "


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


def test_in_a_terminal_a_live_run_is_shown_and_ctrl_c_gives_the_terminal_back(tmp_path: Path) -> None:
    run = write_run(tmp_path, "mine", steps=20, state="running")
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-m", "diagnostics", "watch", run],
        stdin=theirs,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "LINES": "24"},
    )
    os.close(theirs)
    shown = ""
    while "to type" not in shown:
        shown += os.read(ours, 4096).decode()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    shown += os.read(ours, 65536).decode()
    os.close(ours)
    assert (child.returncode, err) == (0, b"")
    assert "mine" in shown
    # The screen it took is given back, and the cursor with it.
    assert shown.rindex("\x1b[?1049l") > shown.rindex("\x1b[?1049h")
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def test_a_forecast_that_begins_is_one_line_in_a_pipe(diagnostics: Command, tmp_path: Path) -> None:
    forecast = {"steps_to_collapse": 40.0, "low": 30.0, "high": 60.0, "confidence": 0.8}
    ended = diagnostics("watch", write_run(tmp_path, steps=100, forecast=forecast))
    assert ended.out.splitlines()[1] == (
        "forecast: collapse in about 40 steps (30 to 60), 80 % sure: step ~139"
    )


def test_a_path_that_is_no_run_gives_2(diagnostics: Command, tmp_path: Path) -> None:
    assert diagnostics("watch", tmp_path).code == 2
