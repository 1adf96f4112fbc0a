"""`diagnostics compact RUN`: fewer, larger part files."""

from pathlib import Path
from typing import Annotated

import typer

from diagnostics.store.compact import compact_run

from .output import answers, say


def compact(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory, live or finished.")],
) -> None:
    """Merge small part files; safe on a live run."""
    result = compact_run(run)
    for path, reason in result.damaged.items():
        say(f"warning: {path} is damaged and was left as it is: {reason}")
    for table, (before, after) in result.files.items():
        text = f"{table}: {before} files" + ("" if before == after else f" -> {after}")
        answers().print(text, soft_wrap=True)
