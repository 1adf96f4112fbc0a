"""The command `diagnostics`: the verbs, and the border where an error becomes one line and an exit code."""

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer

from diagnostics.errors import DiagnosticsError
from diagnostics.version import __version__

from .compact import compact
from .control import control
from .dashboard import dashboard
from .demo import demo
from .exits import OK, USAGE
from .export import export
from .list_runs import list_runs
from .output import readers_may_leave, say, warnings_as_lines
from .report import report
from .watch import watch

# Plain help and errors: boxes drawn around one sentence do not survive a log file or a narrow window.
app = typer.Typer(
    name="diagnostics",
    help="See a transformer's training crash coming, understand it, and stop it while the run is alive.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo)
app.command("list")(list_runs)
app.command("report")(report)
app.command("watch")(watch)
app.command("dashboard")(dashboard)
app.command("control")(control)
app.command("export")(export)
app.command("compact")(compact)


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer hands the option's value on like this
    if asked:
        print(f"diagnostics {__version__}")
        raise typer.Exit(OK)


@app.callback()
def _options(
    *,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    del show_version


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        arguments: what stands behind `diagnostics`; None: the process's own arguments.
    """
    for stream in (sys.stdout, sys.stderr):
        # Where the terminal's encoding lacks a character, a `?` is better than a traceback.
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    with warnings_as_lines():
        code = _run(arguments)
    with readers_may_leave():
        sys.stdout.flush()
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        app(args=None if arguments is None else list(arguments), prog_name="diagnostics")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else OK
    except (DiagnosticsError, OSError) as error:
        say(f"error: {error}")
        return USAGE
    return OK
