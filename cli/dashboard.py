"""`diagnostics dashboard ROOT`: starts the web dashboard and stays with it until it ends."""

import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import FrameType
from typing import Annotated

import typer

from diagnostics.errors import DiagnosticsError

from .choice import Root, runs_below
from .exits import OK, USAGE
from .output import say

PORT = 8501
HOST = "127.0.0.1"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_GRACE_S = 10.0


def dashboard(
    root: Annotated[
        str, typer.Argument(metavar="ROOT", help="A directory or URI that holds runs, or a run.")
    ],
    *,
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port to listen on.")] = PORT,
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than this machine reach it only if told.")
    ] = HOST,
    allow_control: Annotated[
        bool, typer.Option("--allow-control", help="Let the page send commands to live runs.")
    ] = False,
) -> None:
    """Serve the dashboard on the runs below ROOT until Ctrl-C."""
    raise typer.Exit(serve(root, host=host, port=port, allow_control=allow_control))


def serve(root: Root, *, host: str = HOST, port: int = PORT, allow_control: bool = False) -> int:
    """Runs the dashboard as a child process; returns the verb's exit code when it has ended.

    Raises:
        DiagnosticsError: `root` is no directory, the address is taken or not this machine's, or Streamlit is missing.
    """
    if not runs_below(root):
        say(f"no run below {root} yet; the page shows each as soon as it starts")
    _require_free(host, port)
    if find_spec("streamlit") is None:
        raise DiagnosticsError("the dashboard needs Streamlit and Plotly: pip install streamlit plotly")
    if allow_control and host not in _LOOPBACK:
        say(f"warning: whoever reaches {host}:{port} can steer the runs below {root}")
    # The one place where the command line knows the page: found here, so that no other verb needs it installed.
    from diagnostics.app.launch import dashboard_command, dashboard_environment  # noqa: PLC0415 - see above

    command = dashboard_command(root, host=host, port=port, allow_control=allow_control)
    shown = f"[{host}]" if ":" in host else host
    say(f"dashboard on http://{shown}:{port} (Ctrl-C ends it)")
    return _stay_with(command, dashboard_environment())


def _require_free(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            # As the server itself does: a port that only waits for stray packets of an ended server is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise DiagnosticsError(
            f"cannot listen on {host}:{port} ({error.strerror}); another program may have it: give another --port, or --host"
        ) from None


def _stay_with(command: Sequence[str], environment: Mapping[str, str]) -> int:
    # A process group of its own: the terminal's Ctrl-C reaches this process alone, which hands it on once.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=environment, process_group=0)
    asked_to_end = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked_to_end
        del frame
        asked_to_end = True
        child.send_signal(number)

    previous = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while True:
            try:
                code = child.wait(_GRACE_S)
                break
            except subprocess.TimeoutExpired:
                if asked_to_end:
                    child.kill()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if asked_to_end or code == 0:
        return OK
    say(f"the dashboard ended by itself with code {code}; its last lines above say why")
    return USAGE
