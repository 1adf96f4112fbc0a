import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_run, write_table

from diagnostics.cli.phrases import forecast_words
from diagnostics.cli.state import state_lines
from diagnostics.detect.finding import Finding
from diagnostics.report import Report, assess

Command = Callable[..., Any]


def strict_json(text: str) -> Any:
    """Reads JSON as other languages do: NaN and Infinity are errors, and so is a second document."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_a_healthy_run_gives_0_and_a_line_that_says_so(diagnostics: Command, tmp_path: Path) -> None:
    ended = diagnostics("report", write_run(tmp_path))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == "run: healthy at step 99\n"


def test_a_collapsing_run_gives_1_and_says_what_is_wrong_where_since_when_and_what_to_do(
    diagnostics: Command, tmp_path: Path
) -> None:
    run = write_run(tmp_path, steps=100, collapse=True)
    finding = assess(run).findings[0]
    ended = diagnostics("report", run)
    assert ended.code == 1
    first_line = ended.out.splitlines()[0]
    assert first_line.startswith("run: collapsed at step 99")
    assert f"since step {finding.first_step}" in first_line
    assert f"{finding.kind} in {finding.layer}" in first_line
    for name in finding.evidence:
        assert name.removesuffix("_healthy") in ended.out
    assert "(healthy: " in ended.out
    assert f"(alarm at step {finding.raised_step})" in ended.out
    assert finding.message in ended.out
    # The command to type names this run.
    assert f"diagnostics control {run} " in ended.out


@pytest.mark.parametrize(("fail_on", "code"), [("at-risk", 1), ("collapsed", 1), ("diverged", 0)])
def test_a_collapsed_run_fails_only_where_the_threshold_is_not_above_it(
    diagnostics: Command, tmp_path: Path, fail_on: str, code: int
) -> None:
    run = write_run(tmp_path, steps=100, collapse=True)
    assert diagnostics("report", run, "--fail-on", fail_on).code == code


def test_a_run_without_a_step_gives_3(diagnostics: Command, tmp_path: Path) -> None:
    ended = diagnostics("report", write_run(tmp_path, steps=0))
    assert ended.code == 3
    assert ended.out.startswith("run: no data to judge")


@pytest.mark.parametrize("made", ["missing", "file", "folder"])
def test_a_path_that_is_no_run_gives_2_and_one_line_on_stderr(
    diagnostics: Command, tmp_path: Path, made: str
) -> None:
    path = tmp_path / "path"
    if made == "file":
        path.write_text("")
    if made == "folder":
        path.mkdir()
    ended = diagnostics("report", path)
    assert (ended.code, ended.out) == (2, "")
    assert len(ended.err.splitlines()) == 1
    assert str(path) in ended.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("report",),
        ("report", ".", "--fail-on", "healthy"),
        ("report", ".", "--up-to-step", "-1"),
        ("report", ".", "--up-to-step", "soon"),
        ("report", ".", "--colour"),
        ("judge", "."),
    ],
)
def test_wrong_usage_gives_2_and_no_traceback(diagnostics: Command, arguments: tuple[str, ...]) -> None:
    ended = diagnostics(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert "Error: " in ended.err
    assert "Traceback" not in ended.err


def test_json_is_one_document_with_a_list_of_runs_even_for_one_run(
    diagnostics: Command, tmp_path: Path
) -> None:
    run = write_run(tmp_path, steps=100, collapse=True)
    ended = diagnostics("report", run, "--json")
    (judged,) = strict_json(ended.out)["runs"]
    assert (ended.code, ended.err) == (1, "")
    assert (judged["run"], judged["status"], judged["step"]) == ("run", "collapsed", 99)
    assert judged["findings"][0]["kind"] == assess(run).findings[0].kind


def test_json_holds_null_where_the_evidence_is_not_finite(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = {"loss": float("nan"), "logits": [1.0, float("inf")]}
    finding = Finding("divergence", "critical", None, None, 5, evidence, status="diverged")
    report = Report(run="run", status="diverged", step=5, findings=(finding,))
    monkeypatch.setattr("diagnostics.cli.report.assess", lambda *_, **__: report)
    ended = diagnostics("report", write_run(tmp_path), "--json")
    assert strict_json(ended.out)["runs"][0]["findings"][0]["evidence"] == {
        "loss": None,
        "logits": [1.0, None],
    }


def test_of_several_runs_the_worst_counts(diagnostics: Command, tmp_path: Path) -> None:
    write_run(tmp_path, "a")
    assert diagnostics("report", tmp_path).code == 0
    write_run(tmp_path, "b", steps=0)
    assert diagnostics("report", tmp_path).code == 3
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "run.json").write_text('{"schema_version": 999}')
    assert diagnostics("report", tmp_path).code == 2
    write_run(tmp_path, "deep/d", steps=100, collapse=True)
    ended = diagnostics("report", tmp_path, "--json")
    assert ended.code == 1
    statuses = {run["run"]: run["status"] for run in strict_json(ended.out)["runs"]}
    assert statuses == {"a": "healthy", "b": "no-data", "c": "no-data", "d": "collapsed"}


def test_an_unreadable_run_among_readable_ones_is_named_on_stderr_and_hides_none(
    diagnostics: Command, tmp_path: Path
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json").write_text('{"schema_version": 999}')
    write_run(tmp_path, "old")
    ended = diagnostics("report", tmp_path)
    assert ended.code == 2
    assert "schema version 999" in ended.err
    assert "old: healthy at step 99" in ended.out


def test_up_to_step_sees_nothing_of_what_comes_after(diagnostics: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=100, collapse=True)
    ended = diagnostics("report", run, "--up-to-step", 30, "--json")
    (judged,) = strict_json(ended.out)["runs"]
    assert ended.code == 0
    assert (judged["status"], judged["step"], judged["findings"]) == ("healthy", 30, [])


def test_a_damaged_file_is_one_line_on_stderr_and_the_rest_is_judged(
    diagnostics: Command, tmp_path: Path
) -> None:
    run = write_run(tmp_path)
    (part,) = (run / "updates").iterdir()
    part.write_bytes(part.read_bytes()[:200])
    ended = diagnostics("report", run, "--json")
    (judged,) = strict_json(ended.out)["runs"]
    assert (ended.code, judged["status"]) == (0, "healthy")
    assert any(part.name in sentence for sentence in judged["missing"])
    (line,) = ended.err.splitlines()
    assert line.startswith("diagnostics: warning: ")
    assert part.name in line


def test_a_finding_that_cleared_is_told_as_such_and_fails_nothing(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finding = Finding(
        "entropy-collapse",
        "critical",
        "blocks.0.attn",
        1,
        40,
        {"entropy": 0.3},
        status="collapsed",
        last_step=80,
    )
    report = Report(run="run", status="healthy", step=99, findings=(finding,))
    monkeypatch.setattr("diagnostics.cli.report.assess", lambda *_, **__: report)
    ended = diagnostics("report", write_run(tmp_path))
    assert ended.code == 0
    assert ended.out.splitlines()[:2] == [
        "run: healthy at step 99, after 1 finding that cleared again",
        "  critical: entropy-collapse in blocks.0.attn, head 1, from step 40 to 80, recovered",
    ]


def test_a_forecast_is_told_with_its_interval(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecast = {"steps_to_collapse": 120.0, "low": 80.0, "high": 200.0, "confidence": 0.7}
    report = Report(run="run", status="at-risk", step=99, forecast=forecast)
    monkeypatch.setattr("diagnostics.cli.report.assess", lambda *_, **__: report)
    ended = diagnostics("report", write_run(tmp_path))
    assert ended.code == 1
    assert "forecast: collapse in about 120 steps (80 to 200), 70 % sure: step ~219\n" in ended.out


def test_a_forecast_says_which_head_it_rests_on(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forecast = {
        "steps_to_collapse": 30,
        "low": 20,
        "high": 60,
        "confidence": 0.8,
        "layer": "b.attn",
        "head": 2,
        "signal": "max_logit",
        "now": 23.4,
        "level": 50.0,
    }
    report = Report(run="run", status="at-risk", step=99, forecast=forecast)
    assert told(diagnostics, write_run(tmp_path), report, monkeypatch)[1] == (
        "  forecast: collapse in about 30 steps (20 to 60), 80 % sure: step ~129; "
        "max_logit in b.attn, head 2, is 23.4 and heads for 50"
    )


def test_a_loss_that_is_not_a_number_is_a_finding(diagnostics: Command, tmp_path: Path) -> None:
    run = write_run(tmp_path, steps=40)
    rows = [
        {
            "step": step,
            "time_s": 0.0,
            "loss": float("nan"),
            "lr": 1e-3,
            "measured": step % 10 == 0,
            "overhead_s": 0.0,
        }
        for step in range(40, 80)
    ]
    write_table(run, "steps", rows, number=1)
    ended = diagnostics("report", run, "--json")
    (judged,) = strict_json(ended.out)["runs"]
    assert (ended.code, judged["status"]) == (1, "diverged")


def test_the_command_runs_as_a_module_too(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    ended = subprocess.run(
        [sys.executable, "-m", "diagnostics", "report", run], check=False, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "run: healthy at step 99\n", "")


def told(diagnostics: Command, run: Path, report: Report, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that are printed of a report."""
    monkeypatch.setattr("diagnostics.cli.report.assess", lambda *_, **__: report)
    lines: list[str] = diagnostics("report", run).out.splitlines()
    return lines


def test_evidence_is_told_with_the_bands_that_it_left_and_those_come_first(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = {
        "heads": 4,
        "sec_1": None,
        "entropy": 0.31234,
        "entropy_healthy": "above 1.5 nats",
        "max_logit": 140.0,
        "max_logit_healthy": [2.0, 31.5],
        "band": [1.0, 2.0],
    }
    finding = Finding("entropy-collapse", "critical", None, None, 40, evidence, status="collapsed")
    report = Report(run="run", status="collapsed", step=99, findings=(finding,))
    assert (
        "    evidence: entropy 0.3123 (healthy: above 1.5 nats); max_logit 140 (healthy: 2 to 31.5); "
        "heads 4; sec_1 not observed; band 1 to 2"
    ) in told(diagnostics, write_run(tmp_path), report, monkeypatch)


def test_alarms_come_before_what_is_worth_knowing_and_what_is_over_comes_last_in_a_line(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = (
        Finding("logit-growth", "warning", "a.attn", 3, 60, message="grows", status="at-risk"),
        Finding("benign-collapse", "info", "b.attn", 0, 20, message="sharp, and the loss falls"),
        Finding("loss-spike", "warning", None, None, 10, {"loss": 9.0}, "wait", "spiked", last_step=14),
    )
    report = Report(run="run", status="at-risk", step=99, findings=findings)
    assert told(diagnostics, write_run(tmp_path), report, monkeypatch) == [
        "run: at risk at step 99: logit-growth in a.attn, head 3, since step 60",
        "  warning: logit-growth in a.attn, head 3, since step 60",
        "    grows",
        "  worth knowing: benign-collapse in b.attn, head 0, since step 20",
        "    sharp, and the loss falls",
        "  warning: loss-spike of the whole run, from step 10 to 14, recovered",
    ]


def test_what_is_worth_knowing_leaves_a_healthy_run_healthy(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Finding("benign-collapse", "info", "b.attn", 0, 20)
    report = Report(run="run", status="healthy", step=99, findings=(known,))
    assert told(diagnostics, write_run(tmp_path), report, monkeypatch) == [
        "run: healthy at step 99",
        "  worth knowing: benign-collapse in b.attn, head 0, since step 20",
    ]


def test_of_many_findings_that_are_over_the_newest_are_named_and_the_rest_counted(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = tuple(
        Finding("loss-spike", "warning", None, None, step, last_step=step + 2) for step in range(0, 80, 10)
    )
    report = Report(run="run", status="healthy", step=99, findings=findings)
    lines = told(diagnostics, write_run(tmp_path), report, monkeypatch)
    assert lines[0] == "run: healthy at step 99, after 8 findings that cleared again"
    assert lines[1] == "  warning: loss-spike of the whole run, from step 70 to 72, recovered"
    assert lines[6:] == ["  and 3 earlier findings, recovered: loss-spike (3)"]


def test_the_advice_names_the_run_in_every_command_and_nowhere_else(
    diagnostics: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = "RUN hard: `diagnostics control RUN stop`, then `diagnostics report RUN --up-to-step 30`"
    finding = Finding("divergence", "critical", None, None, 5, advice=advice, status="diverged")
    report = Report(run="run", status="diverged", step=99, findings=(finding,))
    run = write_run(tmp_path, "my run")
    lines = told(diagnostics, run, report, monkeypatch)
    assert (
        f"    do: RUN hard: `diagnostics control '{run}' stop`, then `diagnostics report '{run}' --up-to-step 30`"
    ) in lines
    # The synthetic run is finished: nobody hears the command.
    assert "no process listens to commands any more" in lines[-1]


@pytest.mark.parametrize(
    ("forecast", "words"),
    [
        ((120.4, 80.0, 200.0, 0.8), "collapse in about 120 steps (80 to 200), 80 % sure: step ~620"),
        ((1200.0, 800.0, None, 0.9), "collapse in about 1,200 steps (800 or more), 90 % sure: step ~1,700"),
        ((0.0, 0.0, 3.0, 0.9), "collapse is here by now (0 to 3), 90 % sure"),
        ((None, None, None, None), "collapse is coming, when cannot be told"),
    ],
)
def test_a_forecast_in_words(forecast: tuple[float | None, ...], words: str) -> None:
    names = ("steps_to_collapse", "low", "high", "confidence")
    assert forecast_words(dict(zip(names, forecast, strict=True)), 500) == words


NOW = 1_000_000.0


@pytest.mark.parametrize(
    ("info", "sentences"),
    [
        ({"state": "finished", "steps": 100}, []),
        (
            {"state": "running", "steps": 1432, "last_step_s": NOW - 3.0},
            ["still running, step 1,431 was 3 s ago"],
        ),
        (
            {"state": "running", "steps": 0, "started_s": NOW - 90.0},
            ["still running, no step yet, started 2 min ago"],
        ),
        (
            {"state": "stalled", "steps": 100, "heartbeat_s": NOW - 7200.0},
            ["stalled: step 99, its process was last heard of 2 h ago"],
        ),
        (
            {
                "state": "crashed",
                "steps": 100,
                "ended_s": NOW - 3 * 86400.0,
                "error": "Traceback\n  KeyError: 3",
            },
            ["crashed after step 99, last heard of 3 days ago: KeyError: 3"],
        ),
        (
            {
                "state": "finished",
                "steps": 300,
                "attempts": [
                    {"attempt": 1, "first_step": 0, "state": "crashed"},
                    {"attempt": 2, "first_step": 200, "state": "finished"},
                ],
            },
            ["resumed: attempt 2, from step 200 (attempt 1: crashed)"],
        ),
        (
            {
                "state": "finished",
                "steps": 9,
                "faults": [{"where": "b.attn", "error": "KeyError: 3", "trace": ""}],
            },
            [
                "the recorder met 1 fault of its own, what it switched off was not measured: b.attn: KeyError: 3",
            ],
        ),
    ],
)
def test_how_a_run_stands_is_said_where_it_did_not_finish_in_one_go(
    info: dict[str, Any], sentences: list[str]
) -> None:
    assert list(state_lines(info, NOW)) == sentences


def test_a_run_that_is_still_running_says_so_below_its_verdict(diagnostics: Command, tmp_path: Path) -> None:
    first, state = diagnostics("report", write_run(tmp_path, state="running")).out.splitlines()
    assert first == "run: healthy at step 99"
    assert state.startswith("  state: still running, step 99 was ")
