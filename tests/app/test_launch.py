"""The server's command line, and the traps of starting a file of a package."""

import subprocess
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from diagnostics.app.launch import dashboard_command, dashboard_environment


def test_the_server_command_names_what_it_was_asked_for(tmp_path: Path) -> None:
    command = dashboard_command(tmp_path, host="127.0.0.2", port=1234, allow_control=True)
    assert command[1:4] == ["-m", "streamlit", "run"]
    assert Path(command[4]).is_file()
    assert command[command.index("--server.address") + 1] == "127.0.0.2"
    assert command[command.index("--server.port") + 1] == "1234"
    assert command[command.index("--") + 1 :] == [str(tmp_path), "--allow-control"]
    assert "--allow-control" not in dashboard_command(tmp_path)


def test_the_server_asks_nobody_and_tells_nobody(tmp_path: Path) -> None:
    command = dashboard_command(tmp_path)
    assert command[command.index("--server.headless") + 1] == "true"
    assert command[command.index("--browser.gatherUsageStats") + 1] == "false"
    assert command[command.index("--server.address") + 1] == "127.0.0.1"


def test_the_working_directory_hides_no_package_from_the_server(tmp_path: Path) -> None:
    (tmp_path / "diagnostics").mkdir()
    (tmp_path / "diagnostics" / "__init__.py").touch()
    subprocess.run(
        [sys.executable, "-m", "timeit", "-n", "1", "-s", "import diagnostics.app.launch", "pass"],
        cwd=tmp_path,
        env=dashboard_environment(),
        check=True,
        capture_output=True,
    )


def test_building_the_command_needs_no_streamlit() -> None:
    code = "import sys, diagnostics.app.launch; sys.exit('streamlit' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_module_beside_main_hides_an_installed_one() -> None:
    # Streamlit puts main.py's folder first on sys.path.
    names = {
        path.name.removesuffix(".py")
        for path in files("diagnostics.app").iterdir()
        if path.name.endswith(".py")
    }
    assert "main" in names
    assert not names & sys.stdlib_module_names
    assert [name for name in sorted(names - {"__init__"}) if find_spec(name) is not None] == []
