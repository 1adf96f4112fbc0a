"""`diagnostics watch RUN`: follows a live run in the terminal."""

import os
import time
from contextlib import nullcontext
from typing import Annotated

import typer
from rich.console import Console

from diagnostics.report import assess
from diagnostics.store.read import open_run

from .follow import Followed
from .lines import Lines
from .output import answers
from .screen import screen
from .words import print_report

_PERIOD_S = 1.0


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run, by its directory or URI.")],
) -> None:
    """Follow a live run in the terminal until it ends or Ctrl-C."""
    followed = Followed(open_run(run))
    console = answers()
    try:
        follow(followed, console, run)
        print_report(console, assess(run), run, info=followed.info)
    except KeyboardInterrupt:
        return


def follow(followed: Followed, console: Console, run_dir: str | os.PathLike[str]) -> None:
    """Shows the run until it ends.

    Args:
        followed: the run.
        console: a screen is drawn where it is a terminal, lines are written elsewhere.
        run_dir: the run's path or URI, for the commands to type.
    """
    draws = console.is_terminal and not console.is_dumb_terminal
    with screen(console, run_dir) if draws else nullcontext(Lines(console)) as shown:
        while True:
            shown.show(followed, followed.refresh())
            if followed.ended:
                return
            time.sleep(_PERIOD_S)
