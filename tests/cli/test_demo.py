import math
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
        return [write_run(out, "gpt-good", steps=100), write_run(out, "gpt-bad", steps=100, collapse=True)]

    monkeypatch.setattr("diagnostics.demo.main.run_demo", run_demo)
    return asked


def test_the_reports_are_printed_then_a_table_of_the_arms(
    diagnostics: Command, tmp_path: Path, trained: list[dict[str, Any]]
) -> None:
    ended = diagnostics("demo", "--out", tmp_path, "--steps", 7, "--seed", 3, "--no-dashboard")
    # A collapsing arm is what it is for, so its finding is no failure.
    assert (ended.code, ended.err) == (0, "")
    assert trained == [{"out": tmp_path, "steps": 7, "seed": 3}]
    assert "gpt-good: healthy at step 99" in ended.out
    assert "gpt-bad: collapsed at step 99" in ended.out
    table = ended.out.split("how each arm ended")[1].splitlines()
    good, bad = (line.split() for line in table if line.strip().startswith(("gpt-good", "gpt-bad")))
    assert "the arms cannot be compared" in table[-1], "these are not the demonstration's arms"
    # At the last measured step, 90 of 99: entropy 3.5 (1 - bad) + .02 and logits 1 + 150 bad with
    # bad = (90 / 99 - .3) / .7; the spectrum is 1 + 30 bad, .9, .8, .7.
    share = (90 / 99 - 0.3) / 0.7
    sec = (1 + 30 * share) ** 2 / ((1 + 30 * share) ** 2 + 0.81 + 0.64 + 0.49)
    assert (good[0], bad[0]) == ("gpt-good", "gpt-bad")
    assert [float(cell) for cell in good[2:5]] == [3.52, 0.3401, 1.0]
    expected = [3.5 * (1 - share) + 0.02, sec, 1 + 150 * share]
    assert [float(cell) for cell in bad[2:5]] == pytest.approx(expected, rel=1e-3)
    assert (good[5], bad[5]) == ("healthy", "collapsed")
    # The loss falls as exp(-3 done) until done is 1, or .3 in the collapsing arm; the table gives the mean of the
    # last 20 steps, whose noise of .01 averages to .002.
    falling = math.fsum(5.5 * math.exp(-3 * step / 99) for step in range(80, 100)) / 20
    assert float(good[1]) == pytest.approx(falling, abs=0.01)
    assert float(bad[1]) == pytest.approx(5.5 * math.exp(-0.9), abs=0.01)


def test_then_the_dashboard_is_served_on_the_runs(
    diagnostics: Command, tmp_path: Path, trained: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Path] = []

    def serve(root: Path) -> int:
        served.append(root)
        return 0

    monkeypatch.setattr("diagnostics.cli.demo.serve", serve)
    assert diagnostics("demo", "--out", tmp_path).code == 0
    assert served == [tmp_path]
    assert trained[0]["steps"] is None


@pytest.mark.parametrize("steps", ["0", "-1", "many"])
def test_an_impossible_number_of_steps_gives_2(diagnostics: Command, tmp_path: Path, steps: str) -> None:
    assert diagnostics("demo", "--out", tmp_path / "new", "--steps", steps, "--no-dashboard").code == 2
    assert not (tmp_path / "new").exists()
