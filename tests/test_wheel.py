"""What people install: a wheel with every package of the tree, and nothing beside `diagnostics` at its top."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"diagnostics": "diagnostics", "app": "diagnostics/app", "cli": "diagnostics/cli"}


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    # A copy of what git would commit: an ignored or stale file of this checkout must not reach the wheel, and a
    # build/ left behind by an earlier one would put deleted modules back into it.
    copy = tmp_path_factory.mktemp("tree")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    out = tmp_path_factory.mktemp("dist")
    # Source distribution first, wheel from it: a file missing from the former is missing from the latter.
    built = subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy],
        check=False,
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    (_,) = out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def package_folders() -> dict[str, str]:
    """Every folder of the tree that is a package: its path in the wheel to its dotted name."""
    found = {}
    for top, installed in MAPPED.items():
        for init in sorted((ROOT / top).rglob("__init__.py")):
            folder = Path(installed) / init.parent.relative_to(ROOT / top)
            found[folder.as_posix()] = ".".join(folder.parts)
    return found


def test_the_wheel_has_nothing_but_diagnostics_at_its_top(wheel_names: list[str]) -> None:
    top = {name.split("/")[0] for name in wheel_names}
    assert top - {"diagnostics"} == {name for name in top if name.endswith(".dist-info")}
    assert "diagnostics" in top
    assert len(top) == 2


def test_every_module_of_the_tree_is_in_the_wheel(wheel_names: list[str]) -> None:
    modules = {
        (Path(installed) / module.relative_to(ROOT / top)).as_posix()
        for top, installed in MAPPED.items()
        for module in (ROOT / top).rglob("*.py")
    }
    assert {name for name in wheel_names if name.endswith(".py")} == modules


def test_every_package_folder_is_listed_in_pyproject() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert sorted(settings["tool"]["setuptools"]["packages"]) == sorted(package_folders().values())


def test_every_folder_with_modules_is_a_package() -> None:
    folders = {module.parent for top in MAPPED for module in (ROOT / top).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_carries_the_bands_that_the_detectors_judge_by(wheel_names: list[str]) -> None:
    for path in (ROOT / "diagnostics" / "detect").glob("*.json"):
        assert f"diagnostics/detect/{path.name}" in wheel_names
    assert "diagnostics/detect/bands.json" in wheel_names


def test_the_wheel_says_that_the_package_is_typed(wheel_names: list[str]) -> None:
    assert "diagnostics/py.typed" in wheel_names


def test_the_wheel_installs_the_command(wheel_names: list[str]) -> None:
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel_names)
