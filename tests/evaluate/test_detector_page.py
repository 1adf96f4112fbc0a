"""The figures of single detectors stand in the detectors' page, each once, and the same each time."""

from typing import Any

import pytest

from diagnostics.detect.bands import Band
from diagnostics.detect.detectors import DETECTORS
from diagnostics.errors import DiagnosticsError
from sample_runs.evaluate.detector_page import BEGIN, END, PAGE, detector_page

TEXT = f"before\n{BEGIN}\nold\n{END}\nafter\n"


def row(name: str, what: str, hits: int) -> dict[str, Any]:
    """What the evaluation says of one signal: so many of 20 failures, 3 false episodes in 20,000 steps."""
    return {
        "name": name, "what": what, "failing": 20, "hits": hits, "recall": hits / 20, "recall_interval": [0.3, 0.7],
        "lead_median": 12.0, "lead_quartiles": [0.0, 34.0], "quiet_steps": 20_000, "false_per_1000": 0.15,
        "false_per_1000_interval": [0.03, 0.44], "healthy": 40, "healthy_alarmed": 3,
        "healthy_share_interval": [0.02, 0.2],
    }  # fmt: skip


@pytest.fixture
def document() -> dict[str, Any]:
    return {
        "corpus": {"runs": 60, "families": 3},
        "ablation": [
            row("logit-growth", "left out", 19),
            row("logit-growth", "alone", 11),
            row("kurtosis", "alone", 2),
        ],
    }


@pytest.fixture
def bands() -> dict[str, Band]:
    found = {kind: Band({"plain": 2.0}) for kind in DETECTORS}
    found["logit-growth"] = Band({"plain": 1.75, "qk_norm": 2.5}, {"p50": 0.0, "p99": 0.81234, "max": 1.5})
    return found


def line_of(kind: str, page: str) -> str:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| [`{kind}`]")]
    return line


def test_a_detector_shows_what_it_reached_alone_beside_its_band(
    document: dict[str, Any], bands: dict[str, Band]
) -> None:
    assert line_of("logit-growth", detector_page(TEXT, document, bands)) == (
        "| [`logit-growth`](#logit-growth) | 11/20 = 0.55 (0.30-0.70) | 12 (0-34) | 0.15 (0.03-0.44) "
        "| 0 / 0.8123 / 1.5 | 1.75, with QK-norm 2.5 |"
    )


def test_what_raises_no_alarm_and_what_was_not_measured_are_told_apart(
    document: dict[str, Any], bands: dict[str, Band]
) -> None:
    page = detector_page(TEXT, document, bands)
    assert line_of("dead-heads", page).startswith("| [`dead-heads`](#dead-heads) | no alarm | - | - |")
    assert line_of("loss-rise", page).startswith("| [`loss-rise`](#loss-rise) | not measured | - | - |")
    assert line_of("loss-rise", page).endswith("| not measured | 2 |")


def test_every_detector_has_one_row_and_signals_that_none_reads_have_none(
    document: dict[str, Any], bands: dict[str, Band]
) -> None:
    page = detector_page(TEXT, document, bands)
    assert all(line_of(kind, page) for kind in DETECTORS)
    assert "kurtosis" not in page
    assert "60 runs of 3 families" in page


def test_only_what_lies_between_the_markers_is_written_and_writing_twice_changes_nothing(
    document: dict[str, Any], bands: dict[str, Band]
) -> None:
    page = detector_page(TEXT, document, bands)
    assert page.startswith(f"before\n{BEGIN}\n")
    assert page.endswith(f"\n{END}\nafter\n")
    assert "old" not in page
    assert detector_page(page, document, bands) == page


def test_the_page_of_the_package_takes_the_figures(document: dict[str, Any]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    page = detector_page(text, document)
    assert page.split(BEGIN)[0] == text.split(BEGIN)[0]
    assert page.split(END)[1] == text.split(END)[1]


def test_a_page_without_markers_is_an_error(document: dict[str, Any], bands: dict[str, Band]) -> None:
    with pytest.raises(DiagnosticsError, match="detectors:begin"):
        detector_page("no markers", document, bands)
