"""The command that starts the dashboard's server. Imports no streamlit, so that the command line stays quick."""

import os
import sys
from importlib.resources import files

from diagnostics.store.place import place

CONTROL_FLAG = "--allow-control"


def dashboard_command(
    root: str | os.PathLike[str], *, host: str = "127.0.0.1", port: int = 8501, allow_control: bool = False
) -> list[str]:
    """Arguments for `subprocess`; start it with `dashboard_environment()`.

    The server runs main.py as a file and puts the file's folder first on sys.path, so no module beside
    main.py may be called like an installed or a standard one.

    Args:
        root: a run directory or a directory that holds runs, or the URI of one.
        host: address to listen on.
        port: port to listen on.
        allow_control: whether people may send commands to live runs from the page.
    """
    main = files("diagnostics.app") / "main.py"
    options = {
        "server.address": host,
        "server.port": str(port),
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "minimal",
        "theme.base": "light",
        # Streamlit's own accent is red, which these pages keep for alarms.
        "theme.primaryColor": "#0072B2",
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    flags = [CONTROL_FLAG] if allow_control else []
    return [sys.executable, "-m", "streamlit", "run", str(main), *arguments, "--", str(place(root)), *flags]


def dashboard_environment() -> dict[str, str]:
    """The environment to start the server in.

    Without PYTHONSAFEPATH, `python -m` puts the working directory on sys.path; in a checkout that makes
    its bare `diagnostics/` folder hide the installed package, and `diagnostics.app` is not found.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1"}
