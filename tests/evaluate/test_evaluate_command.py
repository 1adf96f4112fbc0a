"""`make evaluate` from end to end, on two drawn courses."""

from pathlib import Path

import numpy as np
import pytest
from blocks import block_of
from proof_courses import course

from sample_runs.evaluate import __main__ as command
from sample_runs.evaluate import detector_page
from sample_runs.evaluate.report import BEGIN, END


@pytest.fixture
def readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A README with markers, beside which results.json is written."""
    found = tmp_path / "README.md"
    found.write_text(f"before\n{BEGIN}\n{END}\nafter\n", encoding="utf-8")
    # Growing, so that something is forecast.
    block = block_of(
        lambda step: {
            "loss": 2.0 + step / 500,
            "max_logit": 2.0 * float(np.exp(step / 40)),
            "entropy": 2.0 * float(np.exp(-step / 60)),
            "entropy_frac": 0.9 * float(np.exp(-step / 60)),
        },
        200,
        every=10,
    )
    courses = [course("healthy", name=f"{family}-0", family=family, block=block) for family in ("gpt", "vit")]
    page = tmp_path / "detectors.md"
    page.write_text(f"{detector_page.BEGIN}\n{detector_page.END}\n", encoding="utf-8")
    monkeypatch.setattr(command, "README", found)
    monkeypatch.setattr(command, "PAGE", page)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(command, "load_corpus", lambda: courses)
    monkeypatch.setattr(command, "real_logs_document", lambda: None)
    return found


def test_the_figures_are_written_shown_and_the_same_the_second_time(
    readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([]) == 0
    first = readme.read_bytes(), (readme.parent / "results.json").read_bytes()
    assert "| 0 of 2 (0%-66%) |" in first[0].decode()
    assert "Detectors and baselines" in capsys.readouterr().out
    assert command.main([]) == 0
    assert (readme.read_bytes(), (readme.parent / "results.json").read_bytes()) == first
    assert command.main(["--check"]) == 0


def test_a_check_tells_figures_that_are_not_those_on_record(
    readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["--check"]) == 1
    assert "results.json is missing" in capsys.readouterr().err
    command.main([])
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.replace("0 of 2", "1 of 2"), encoding="utf-8")
    assert command.main(["--check"]) == 1
    assert "README.md does not show" in capsys.readouterr().err


def test_a_check_tells_a_page_of_the_detectors_that_shows_other_figures(
    readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main([])
    page = readme.parent / "detectors.md"
    page.write_text(page.read_text(encoding="utf-8").replace("no alarm", "all alarms"), encoding="utf-8")
    assert command.main(["--check"]) == 1
    assert "diagnostics/detect/README.md does not show" in capsys.readouterr().err.replace("\n", " ")


def test_a_check_tells_figures_of_other_sources(readme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command.main([])
    assert readme.is_file()
    monkeypatch.setattr(command, "inputs_hash", lambda: "of something else")
    assert command.main(["--check"]) == 1
