"""`diagnostics export RUN`: the run in another tool's format."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from diagnostics.store.export import export_run
from diagnostics.store.read import open_run

from .output import answers


class Format(StrEnum):
    """What `--to` takes."""

    CSV = "csv"
    TENSORBOARD = "tensorboard"
    JSONL = "jsonl"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory or its URI.")],
    *,
    to: Annotated[Format, typer.Option("--to", help="The format.")],
    out: Annotated[Path, typer.Option("--out", help="A new or empty folder.")],
) -> None:
    """Write the run in another tool's format.

    csv and jsonl give one file per table, tensorboard one event file. An empty field (csv) or null (jsonl) was not measured; NaN and Infinity were, and are written as such.
    """
    for path, rows in export_run(open_run(run), to.value, out).items():
        answers().print(f"{path}: {rows} {'values' if to is Format.TENSORBOARD else 'rows'}", soft_wrap=True)
