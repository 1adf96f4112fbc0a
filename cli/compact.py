"""`diagnostics compact RUN`: fewer, larger part files."""

from typing import Annotated

import typer

from diagnostics.store.compact import compact_run
from diagnostics.store.place import place
from diagnostics.store.remote.spool import compact_uri

from .output import answers, say


def compact(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, live or finished, or its URI.")],
) -> None:
    """Merge small part files; safe on a live run.

    For a URI: on the machine that recorded the run; uploads what was not uploaded.
    """
    local = place(run).local
    result = compact_uri(run) if local is None else compact_run(local)
    for path, reason in result.damaged.items():
        say(f"warning: {path} is damaged and was left as it is: {reason}")
    for table, (before, after) in result.files.items():
        text = f"{table}: {before} files" + ("" if before == after else f" -> {after}")
        answers().print(text, soft_wrap=True)
