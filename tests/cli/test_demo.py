from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic import write_run

Command = Callable[..., Any]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Training stood in for: what the verb asks for, and runs with known contents in its place."""
    asked: list[dict[str, Any]] = []

    def run_demo(out: Path, *, steps: int | None, seed: int) -> list[Path]:
        asked.append({"out": out, "steps": steps, "seed": seed})
        return [write_run(out, "gpt-good", steps=400), write_run(out, "gpt-bad", steps=400, collapse=True)]

    monkeypatch.setattr("diagnostics.demo.main.run_demo", run_demo)
    return asked


def test_the_reports_are_printed_then_a_table_of_the_arms(
    diagnostics: Command, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    ended = diagnostics("demo", "--out", tmp_path, "--steps", 7, "--seed", 3, "--no-dashboard")
    # A collapsing arm is what it is for, so its finding is no failure.
    assert (ended.code, ended.err) == (0, "")
    assert trained == [{"out": tmp_path, "steps": 7, "seed": 3}]
    assert "gpt-good: healthy at step 399" in ended.out
    assert "gpt-bad: collapsed at step 399" in ended.out
    good, bad = (line.split() for line in ended.out.splitlines()[-3:] if line.strip())
    # At the last measured step, 390 of 399: entropy 3.5 (1 - bad) + .02 and logits 1 + 150 bad with
    # bad = (390 / 399 - .3) / .7; the spectrum is 1 + 30 bad, .9, .8, .7.
    share = (390 / 399 - 0.3) / 0.7
    sec = (1 + 30 * share) ** 2 / ((1 + 30 * share) ** 2 + 0.81 + 0.64 + 0.49)
    assert (good[0], bad[0]) == ("gpt-good", "gpt-bad")
    assert [float(cell) for cell in good[2:5]] == [3.52, 0.3401, 1.0]
    expected = [3.5 * (1 - share) + 0.02, sec, 1 + 150 * share]
    assert [float(cell) for cell in bad[2:5]] == pytest.approx(expected, rel=1e-3)
    assert (good[5], bad[5]) == ("healthy", "collapsed")
    # The loss settles at 5.5 exp(-3) and 5.5 exp(-.9), give or take the noise of .01 and the last steps' fall.
    assert float(good[1]) == pytest.approx(5.5 * 0.0498, abs=0.05)
    assert float(bad[1]) == pytest.approx(5.5 * 0.4066, abs=0.05)


def test_then_the_dashboard_is_served_on_the_runs(
    diagnostics: Command, tmp_path: Path, trained: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Path] = []
    monkeypatch.setattr("diagnostics.cli.demo.serve", lambda root: served.append(root) or 0)
    assert diagnostics("demo", "--out", tmp_path).code == 0
    assert served == [tmp_path]
    assert trained[0]["steps"] is None


@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_an_impossible_number_of_steps_gives_2(diagnostics: Command, tmp_path: Path, steps: str) -> None:
    assert diagnostics("demo", "--out", tmp_path / "new", "--steps", steps, "--no-dashboard").code == 2
    assert not (tmp_path / "new").exists()
