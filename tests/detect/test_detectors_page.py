"""The detectors' page and the README's list speak of the detectors that there are, and of no others."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import diagnostics.detect
from diagnostics.detect.detectors import DETECTORS
from diagnostics.detect.window import Window
from sample_runs.evaluate.scores import FITTED

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "diagnostics" / "detect" / "README.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def advice() -> dict[str, str]:
    """Every constant of the package that is advice to people, by where it stands."""
    found = {}
    for module in pkgutil.iter_modules(diagnostics.detect.__path__, "diagnostics.detect."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if name.endswith("ADVICE"):
                found[f"{module.name}.{name}"] = value
    return found


def shown(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "diagnostics", *words, "--help"], capture_output=True, text=True, check=True, cwd="/"
    )  # fmt: skip
    return done.stdout


def rows_between(marker: str, text: str) -> list[list[str]]:
    part = text.split(f"<!-- {marker}:begin -->")[1].split(f"<!-- {marker}:end -->", maxsplit=1)[0]
    lines = [line for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def origins() -> dict[tuple[str, ...], str]:
    """Where edges come from, by the detectors that have them."""
    part = PAGE.split("| edges | where from |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines()]
    return {tuple(re.findall(r"`([^`]+)`", kinds)): origin for kinds, origin in rows}


def test_every_detector_has_its_section_and_no_other_does() -> None:
    part = PAGE.split("## The detectors one by one\n")[1].split("\n## ")[0]
    assert re.findall(r"^### (.+)$", part, flags=re.MULTILINE) == list(DETECTORS)


@pytest.mark.parametrize("kind", DETECTORS)
def test_a_section_says_rule_source_faults_and_needs(kind: str) -> None:
    section = PAGE.split(f"\n### {kind}\n")[1].split("\n### ")[0].split("\n## ")[0]
    assert re.findall(r"^\*\*(\w+)\.\*\*", section, flags=re.MULTILINE) == [
        "Rule",
        "Source",
        "Wrong",
        "Needs",
    ]


def test_every_detector_has_a_band_and_no_other_does() -> None:
    text = (ROOT / "diagnostics" / "detect" / "bands.json").read_text(encoding="utf-8")
    assert set(json.loads(text)["detectors"]) == set(DETECTORS)


def test_the_page_says_where_the_edge_of_every_detector_comes_from() -> None:
    assert sorted(kind for kinds in origins() for kind in kinds) == sorted(DETECTORS)


def test_the_page_names_the_edges_that_are_fitted_on_the_corpus() -> None:
    fitted = [kinds for kinds, origin in origins().items() if origin.startswith("fitted on the corpus")]
    assert fitted == [FITTED]


def test_the_page_says_no_alarm_of_those_that_raise_none() -> None:
    quiet = {kind for kinds, origin in origins().items() for kind in kinds if "no alarm" in origin}
    assert quiet == {kind for kind, d in DETECTORS.items() if d.status == "healthy"}


def test_the_page_has_the_alarm_settings_that_are_in_the_code() -> None:
    coded = [
        [f"`{kind}`", d.severity, d.status, d.over, str(d.needed), str(d.calm), str(d.refractory), str(d.stay_share)]
        for kind, d in DETECTORS.items()
    ]  # fmt: skip
    assert rows_between("machine", PAGE) == coded


def test_the_readme_lists_every_finding_with_its_severity_and_status() -> None:
    rows = {row[0]: (row[2], row[3]) for row in rows_between("findings", README)}
    assert rows == {f"`{kind}`": (d.severity, d.status) for kind, d in DETECTORS.items()}


def test_every_detector_that_can_alarm_gives_advice_from_a_constant() -> None:
    """Such that the test below sees all commands that a finding may name."""
    spoken = {place.rpartition(".")[0] for place in advice()}
    assert {d.__module__ for d in DETECTORS.values() if d.status != "healthy"} <= spoken


def test_advice_names_only_commands_and_options_that_exist() -> None:
    quoted = [command for text in advice().values() for command in re.findall(r"`diagnostics ([^`]+)`", text)]
    assert quoted
    known = re.findall(r"^  (\w+)  ", shown().split("Commands:")[1], flags=re.MULTILINE)
    for verb in {command.split()[0] for command in quoted}:
        assert verb in known
        page = shown(verb)
        for command in quoted:
            if command.split()[0] == verb:
                assert set(re.findall(r"--[a-z-]+", command)) <= set(re.findall(r"--[a-z-]+", page)), command
                remedies = [
                    word for word in command.split()[1:] if word.islower() and not word.startswith("-")
                ]
                assert all(word in page for word in remedies), command


def test_a_command_in_advice_calls_the_run_by_the_word_that_the_report_replaces() -> None:
    quoted = [command for text in advice().values() for command in re.findall(r"`diagnostics ([^`]+)`", text)]
    assert all(command.split()[1] == "RUN" for command in quoted)


def test_the_page_names_everything_that_the_forecast_is_made_with() -> None:
    part = PAGE.split("## The forecast")[1].split("\n## ", maxsplit=1)[0]
    text = (ROOT / "diagnostics" / "detect" / "forecast.json").read_text(encoding="utf-8")
    shipped = json.loads(text)
    names = {*shipped, *shipped["calibration"], *shipped["calibration"]["rule"]} - {"calibration", "rule"}
    assert {name for name in names if f"`{name}`" not in part} == set()


def test_the_spans_that_the_page_names_are_those_of_the_code() -> None:
    window = importlib.import_module(Window.__module__)
    assert (window.GROWTH_STEPS, window.HELD_STEPS, window.HELD_FRAMES) == (50, 200, 33)
    assert "200 steps or 33 frames" in PAGE
    assert "Growth is ln(now / 50 steps ago)" in PAGE
