"""`report` on many runs: the summary, and judging them in processes of their own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import judges
import pytest
from rich.console import Console
from synthetic import write_run

from diagnostics.cli.judging import Judged, judge_each
from diagnostics.cli.summary import Entry, counts, print_summary, worst_first
from diagnostics.detect.finding import Finding
from diagnostics.errors import DamagedDataWarning
from diagnostics.report import Report

Command = Callable[..., Any]


@pytest.fixture
def in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Judges nothing in this process: how long runs take here decides nothing."""
    monkeypatch.setattr("diagnostics.cli.judging._ALONE_S", 0.0)
    monkeypatch.setattr("diagnostics.cli.judging._FEW", 0)


def entry(name: str, status: str, *findings: Finding, state: str = "finished", **forecast: float) -> Entry:
    step = None if status == "no-data" else 99
    report = Report(run=name, status=status, step=step, findings=findings, forecast=forecast or None)
    return Entry(name, Judged(name, report, {"state": state}))


def finding(severity: str) -> Finding:
    return Finding("logit-growth", severity, "a.attn", 1, 40)


def printed(entries: list[Entry], **how: Any) -> str:
    out = StringIO()
    console = Console(file=out, width=150, color_system=None, **how)
    print_summary(console, entries)
    return out.getvalue()


def test_the_worst_run_comes_first() -> None:
    entries = [
        entry("healthy", "healthy"),
        entry("empty", "no-data"),
        entry("later", "at-risk", finding("warning"), steps_to_collapse=900.0),
        entry("soon", "at-risk", finding("warning"), steps_to_collapse=20.0),
        entry("severe", "at-risk", finding("critical")),
        entry("gone", "diverged", finding("critical")),
        entry("collapsed", "collapsed", finding("critical")),
    ]
    names = [each.name for each in worst_first(entries)]
    assert names == ["gone", "collapsed", "severe", "soon", "later", "empty", "healthy"]


def test_in_a_pipe_each_run_is_a_line_with_aligned_columns() -> None:
    forecast = {"steps_to_collapse": 20.0, "low": 10.0, "high": 30.0, "confidence": 0.8}
    lines = printed(
        [
            entry("a", "collapsed", finding("critical"), state="crashed"),
            entry("longer", "at-risk", state="running", **forecast),
            entry("known", "healthy", finding("info")),
            entry("none", "no-data"),
        ]
    ).splitlines()
    assert lines == [
        "a: collapsed at step 99     crashed   logit-growth in a.attn, head 1, since step 40",
        (
            "longer: at risk at step 99  running                                                  "
            "collapse in about 20 steps (10 to 30), 80 % sure: step ~119"
        ),
        "known: healthy at step 99   finished  worth knowing: logit-growth in a.attn, head 1",
        "none: no data to judge      finished",
    ]


def test_on_a_screen_many_healthy_runs_do_not_push_the_others_out_of_sight() -> None:
    entries = [entry("bad", "at-risk"), *(entry(f"good-{number}", "healthy") for number in range(50))]
    shown = printed(entries, force_terminal=True)
    assert "bad" in shown
    assert "good-19" in shown
    assert "good-20" not in shown
    assert "and 30 more healthy runs" in shown


def test_the_last_line_counts() -> None:
    entries = [
        entry("a", "diverged", state="crashed"),
        entry("b", "at-risk", state="running"),
        entry("c", "healthy", state="running"),
        entry("d", "no-data"),
    ]
    assert counts(entries) == (
        "4 runs: 1 diverged, 1 at risk, 1 without data, 1 healthy; 2 still running, 1 crashed"
    )


def test_of_several_runs_there_is_a_summary_and_the_details_of_those_not_healthy(
    diagnostics: Command, tmp_path: Path
) -> None:
    write_run(tmp_path, "good")
    bad = write_run(tmp_path, "deep/bad", collapse=True)
    ended = diagnostics("report", tmp_path)
    lines = ended.out.splitlines()
    assert ended.code == 1
    assert lines[0].startswith("deep/bad: collapsed at step 99")
    assert lines[1].split() == ["good:", "healthy", "at", "step", "99", "finished"]
    # Then the details, with commands that name the run, and the counts.
    assert lines[3].startswith("deep/bad: collapsed at step 99: ")
    assert f"diagnostics control {bad} " in ended.out
    assert not any(line.startswith("good") for line in lines[2:])
    assert lines[-1] == "2 runs: 1 collapsed, 1 healthy"


def test_a_fault_at_one_run_is_named_and_loses_no_other(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path, "faulty")
    write_run(tmp_path, "good")
    monkeypatch.setattr("diagnostics.cli.report.assess", judges.troubled)
    ended = diagnostics("report", tmp_path, "--up-to-step", "50")
    assert ended.code == 2
    assert f"{tmp_path / 'faulty'} could not be judged: KeyError: 'entropy'" in ended.err
    assert "faulty: no data to judge  unreadable" in ended.out
    assert "good: healthy at step 50" in ended.out


@pytest.mark.usefixtures("in_workers")
def test_runs_are_judged_beside_each_other_in_order_and_what_is_warned_of_is_said_here(
    tmp_path: Path,
) -> None:
    run_dirs = [write_run(tmp_path, name, steps=1) for name in ("a", "odd", "b", "c", "d", "e")]
    done: list[int] = []
    with pytest.warns(DamagedDataWarning, match="odd is damaged"):
        found = judge_each(run_dirs, 7, judges.where, done.append)
    assert [judged.report.run for judged in found] == ["a", "odd", "b", "c", "d", "e"]
    assert {judged.report.step for judged in found} == {7}
    assert [judged.info["state"] for judged in found] == ["finished"] * 6
    assert done == [1, 2, 3, 4, 5, 6]
    pids = {judged.report.missing[0] for judged in found}
    assert str(os.getpid()) not in pids


@pytest.mark.usefixtures("in_workers")
def test_a_run_that_kills_its_worker_and_one_that_fails_lose_no_other(tmp_path: Path) -> None:
    names = [*"abcd", "faulty", *"efgh", "killer", *"ijkl"]
    found = judge_each([write_run(tmp_path, name, steps=1) for name in names], 7, judges.troubled)
    troubles = {judged.report.run: judged.trouble for judged in found if judged.trouble is not None}
    assert list(troubles) == ["faulty", "killer"]
    assert troubles["faulty"] == f"{tmp_path / 'faulty'} could not be judged: KeyError: 'entropy'"
    assert troubles["killer"].startswith(f"{tmp_path / 'killer'} could not be judged: the process that tried")
    assert [judged.report.status for judged in found].count("healthy") == len(names) - 2


def test_a_script_that_guards_no_main_part_is_served_all_the_same(tmp_path: Path) -> None:
    for name in "abcd":
        write_run(tmp_path / "runs", name, steps=1)
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom diagnostics.cli import judging\nfrom diagnostics.cli.main import main\n"
        "judging._ALONE_S, judging._FEW = 0.0, 0\nmain(['report', sys.argv[1]])\n"
    )
    ended = subprocess.run(
        [sys.executable, script, tmp_path / "runs"], check=False, capture_output=True, text=True, timeout=120
    )
    assert [line.split(":")[0] for line in ended.stdout.splitlines()[:4]] == ["a", "b", "c", "d"]


def test_ctrl_c_ends_the_workers_at_once_and_without_their_tracebacks(tmp_path: Path) -> None:
    run_dirs = [write_run(tmp_path, name, steps=1) for name in "abcd"]
    program = (
        "import sys, judges\nfrom diagnostics.cli import judging\njudging._ALONE_S, judging._FEW = 0.0, 0\n"
        "judging.judge_each(sys.argv[1:], None, judges.endless)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, run_dirs)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(judges.__file__).parent)},
    )
    while not any((run_dir / "begun").exists() for run_dir in run_dirs):
        assert child.poll() is None
        time.sleep(0.05)
    # As a terminal does: to the whole group.
    os.killpg(child.pid, signal.SIGINT)
    # A worker sleeps for ten minutes; it holds stderr open while it lives.
    _, err = child.communicate(timeout=60)
    assert child.returncode != 0
    assert err.count("Traceback") == 1
    assert err.splitlines()[-1] == "KeyboardInterrupt"
