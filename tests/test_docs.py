"""The README is a tested artefact: its Python runs, its commands exist, its printed report is the real one."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from diagnostics.store.format import STEP_SCALARS, TABLES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    return [line[2:] for block in blocks("console") for line in block.splitlines() if line.startswith("$ ")]


def between(marker: str) -> str:
    found = re.search(rf"<!-- {marker}: begin -->\n(.*?)<!-- {marker}: end -->", README, flags=re.DOTALL)
    assert found is not None, f"the README has no part {marker!r}"
    return found.group(1)


def test_the_python_blocks_run_one_after_the_other_in_an_empty_folder(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text("\n".join(blocks("python")), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "first" / "run.json").exists()


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("diagnostics ")])
def test_a_command_of_the_readme_exists(command: str) -> None:
    verb = command.split()[1]
    done = subprocess.run(
        [sys.executable, "-m", "diagnostics", verb, "--help"],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    for option in re.findall(r"--[a-z-]+", command):
        assert option in done.stdout


def test_make_knows_the_targets_of_the_readme() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in [command.split()[1] for command in commands() if command.startswith("make ")]:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)


def test_the_report_in_the_readme_is_what_the_command_prints() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "diagnostics", "report", "sample_runs/gpt-no-warmup"],
        cwd=ROOT, capture_output=True, text=True, check=False, env={"PATH": "", "COLUMNS": "110"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    shown = between("report").replace("```text\n", "").replace("```\n", "")
    assert " ".join(shown.split()) == " ".join(done.stdout.split())


def test_every_file_the_readme_points_at_is_there() -> None:
    for name in re.findall(r"`((?:diagnostics|app|cli|sample_runs)/[^`]*)`", README) + re.findall(
        r"\]\((sample_runs/[^)]+)\)", README
    ):
        assert (ROOT / name).exists(), name


def test_the_run_directory_is_documented_column_by_column() -> None:
    page = (ROOT / "diagnostics" / "store" / "README.md").read_text(encoding="utf-8")
    for table, columns in TABLES.items():
        _, _, part = page.partition(f"**{table}**")
        rows = [line for line in part.split("\n\n")[1].splitlines() if line.startswith("| `")]
        added = STEP_SCALARS if table == "steps" else ()
        assert rows == [f"| `{c.name}` | {c.type} | {c.unit} | {c.meaning} |" for c in (*columns, *added)]
