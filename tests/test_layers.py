"""Import directions: two halves that meet only in the run directory, and layers within them."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from synthetic import write_run

ROOT = Path(__file__).resolve().parent.parent
TOPS = {"diagnostics": "diagnostics", "app": "diagnostics.app", "cli": "diagnostics.cli"}

# What each layer may import of the package, itself and the version always included. A longer name wins over a shorter one:
# control.mailbox is no part of what is said of control. "" is diagnostics/__init__.py.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "version": set(),
    "border": {"errors"},
    "store": {"errors"},
    "control.commands": {"errors"},
    "control.mailbox": {"errors", "store", "control.commands"},
    "measure": {"errors"},
    "detect": {"errors", "store"},
    "report": {"errors", "store", "detect"},
    "attach": {"errors", "measure"},
    "remedies": {"errors", "border", "measure", "attach"},
    "control": {"errors", "store", "attach", "remedies", "control.commands", "control.mailbox"},
    "record": {
        "errors",
        "border",
        "store",
        "measure",
        "attach",
        "detect",
        "remedies",
        "control",
        "control.commands",
        "control.mailbox",
    },
    "integrations": {"errors", "record"},
    "demo": {"", "errors", "store", "record", "remedies", "report", "control.mailbox"},
    "app": {"errors", "store", "detect", "report", "control.commands", "control.mailbox"},
    "cli": {"errors", "store", "detect", "report", "control.commands", "control.mailbox"},
    "__main__": {"cli"},
    "": {"record", "control", "remedies", "store", "report"},
}
# The exceptions: one module each, inside a function only.
LAZY_EXCEPTIONS = {("diagnostics.cli.demo", "demo"), ("diagnostics.cli.dashboard", "app")}

VIEWING = ("errors", "store", "detect", "report", "control.commands", "control.mailbox", "app", "cli", "")
LIVE = ("border", "measure", "attach", "record", "remedies", "control", "integrations", "demo")
WEB = {"streamlit", "plotly", "typer"}
DRAWERS = {"util", "utils", "helper", "helpers", "misc", "common", "manager"}


@dataclass(frozen=True)
class Import:
    """The target of one import, absolute; `lazy` where it does not run when the module is imported."""

    target: str
    lazy: bool
    relative: bool


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by the name it is installed under."""
    found = {}
    for top, installed in TOPS.items():
        for path in sorted((ROOT / top).rglob("*.py")):
            inside = path.relative_to(ROOT / top).with_suffix("").parts
            found[".".join((installed, *(part for part in inside if part != "__init__")))] = path
    return found


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


@cache
def imports_of(name: str) -> tuple[Import, ...]:
    path = modules()[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    inside = {
        id(node)
        for around in ast.walk(tree_of(path))
        if isinstance(around, (ast.FunctionDef, ast.AsyncFunctionDef)) or is_for_types(around)
        for node in ast.walk(around)
    }
    found = []
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, id(node) in inside, relative=False) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            above = above[: len(above) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                # `from package import module` means the module, `from module import name` the module before it.
                full = f"{base}.{alias.name}"
                found.append(
                    Import(full if full in modules() else base, id(node) in inside, relative=node.level > 0)
                )
    return tuple(found)


def layer_of(name: str) -> str:
    inside = name.removeprefix("diagnostics").removeprefix(".")
    fitting = [layer for layer in ALLOWED if layer and (inside == layer or inside.startswith(f"{layer}."))]
    assert fitting or not inside, f"{name} belongs to no layer: say in ALLOWED what it may import"
    return max(fitting, key=len, default="")


def is_ours(target: str) -> bool:
    return target.split(".", maxsplit=1)[0] == "diagnostics"


def names_of(layers: tuple[str, ...]) -> list[str]:
    return [name for name in modules() if layer_of(name) in layers]


def reached_at_import(name: str) -> dict[str, str]:
    """Every foreign top-level package that importing `name` imports, with the module that asks for it."""
    foreign: dict[str, str] = {}
    waiting, seen = [name], set[str]()
    while waiting:
        module = waiting.pop()
        if module in seen or module not in modules():
            continue
        seen.add(module)
        # Importing a.b.c runs a and a.b too.
        parts = module.split(".")
        waiting += [".".join(parts[:length]) for length in range(1, len(parts))]
        for entry in imports_of(module):
            if entry.lazy:
                continue
            if is_ours(entry.target):
                waiting.append(entry.target)
            else:
                foreign.setdefault(entry.target.split(".")[0], module)
    return foreign


def test_each_layer_imports_only_what_it_may() -> None:
    wrong = []
    for name in modules():
        layer = layer_of(name)
        for entry in imports_of(name):
            if not is_ours(entry.target):
                continue
            target = layer_of(entry.target)
            if target in (layer, "version") or target in ALLOWED[layer]:
                continue
            if entry.lazy and (name, target) in LAZY_EXCEPTIONS:
                continue
            wrong.append(f"{name} imports {entry.target}")
    assert wrong == []


def test_the_viewing_half_never_names_torch() -> None:
    named = {(name, entry.target) for name in names_of(VIEWING) for entry in imports_of(name)}
    assert [pair for pair in sorted(named) if pair[1].split(".")[0] == "torch"] == []


@pytest.mark.parametrize("name", names_of(VIEWING))
def test_importing_a_module_of_the_viewing_half_reaches_no_torch(name: str) -> None:
    assert "torch" not in reached_at_import(name)


@pytest.mark.parametrize("name", names_of(LIVE))
def test_importing_a_module_of_the_live_half_reaches_no_web_page_and_no_command_line(name: str) -> None:
    reached = reached_at_import(name)
    assert {package: asked for package, asked in reached.items() if package in WEB} == {}
    # A progress bar is the demonstration's; a recorder inside someone's training prints nothing.
    assert "rich" not in reached or layer_of(name) == "demo"


def test_app_and_cli_are_reached_by_relative_imports_only() -> None:
    wrong = []
    for name in modules():
        for entry in imports_of(name):
            first = entry.target.split(".")[0]
            if first in ("app", "cli"):
                wrong.append(
                    f"{name}: import {entry.target} is another module object than diagnostics.{entry.target}"
                )
            own_name = entry.target.startswith(("diagnostics.app", "diagnostics.cli")) and not entry.relative
            # Streamlit runs main.py as a script and __main__ is one: neither has a package to be relative to.
            if own_name and name not in (
                "diagnostics.app.main",
                "diagnostics.__main__",
                "diagnostics.cli.dashboard",
            ):
                wrong.append(f"{name}: {entry.target} by its absolute name")
    assert wrong == []


def test_no_file_is_a_drawer() -> None:
    files = [path for top in (*TOPS, "tests") for path in (ROOT / top).rglob("*.py")]
    assert [str(path) for path in files if set(path.stem.strip("_").split("_")) & DRAWERS] == []


def test_only_the_border_catches_everything() -> None:
    broad = []
    for name, path in modules().items():
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.ExceptHandler):
                continue
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            if any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in caught):
                broad.append(name)
    assert broad == ["diagnostics.border"]


def run_without(packages: set[str], program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program in a Python in which these packages cannot be imported."""
    blocked = f"import sys\nfor name in {sorted(packages)!r}:\n    sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", blocked + program, *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
    )


def test_a_run_is_read_and_judged_without_torch(tmp_path: Path) -> None:
    program = """
import diagnostics
run = diagnostics.open_run(sys.argv[1])
print(len(run.steps()), len(run.attention()), diagnostics.assess(run).status)
"""
    ended = run_without({"torch"}, program, write_run(tmp_path, steps=40))
    # 40 steps, every tenth measured, in 2 layers of 2 heads.
    assert (ended.stdout.split()[:2], ended.stderr) == (["40", "16"], "")


@pytest.mark.parametrize("verb", ["list", "report"])
def test_the_command_line_works_without_torch_and_without_the_web_page(verb: str, tmp_path: Path) -> None:
    write_run(tmp_path, "mine", steps=40)
    program = "from diagnostics.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    ended = run_without({"torch", "streamlit", "plotly"}, program, verb, tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "mine" in ended.stdout


def test_the_demonstration_says_that_it_needs_torch(tmp_path: Path) -> None:
    program = "from diagnostics.cli.main import main\nsys.exit(main(sys.argv[1:]))"
    ended = run_without({"torch"}, program, "demo", "--out", tmp_path / "demo", "--no-dashboard")
    assert ended.returncode == 2
    assert "pip install torch" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_training_is_recorded_without_the_web_page_and_the_command_line(tmp_path: Path) -> None:
    program = """
import torch
from diagnostics import Recorder, open_run
torch.set_num_threads(1)
model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
optimizer = torch.optim.AdamW(model.parameters())
with Recorder(model, optimizer, sys.argv[1], every=2) as recorder:
    for _ in range(3):
        loss = model(torch.randn(2, 5, 16)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.step(loss=loss)
print(len(open_run(sys.argv[1]).steps()))
"""
    ended = run_without({*WEB, "rich"}, program, tmp_path / "run")
    assert ended.stdout.split() == ["3"]
    # The table of sites at attach, and again once the layout is confirmed; no warning beside it.
    lines = ended.stderr.splitlines()
    assert lines[::2] == ["diagnostics: TransformerEncoderLayer: 1 attention sites"] * 2
    assert all(line.startswith("  self_attn: 2 heads") for line in lines[1::2])
