"""`diagnostics list ROOT`: the runs below a directory."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from diagnostics.errors import NewerSchemaError, NotARunError
from diagnostics.report import assess
from diagnostics.store.manifest import live_state, read_manifest

from .choice import runs_below, short_name
from .exits import OK, USAGE
from .output import answers, print_json, say
from .words import STATUS_STYLES


def list_runs(
    root: Annotated[Path, typer.Argument(metavar="ROOT", help="A directory that holds runs.")],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Show the runs below ROOT: name, state, steps, status."""
    rows, code = [], OK
    for run_dir in runs_below(root):
        try:
            rows.append(_row(run_dir, root))
        except (NotARunError, NewerSchemaError) as error:
            say(str(error))
            code = USAGE
    if as_json:
        print_json({"runs": rows})
    elif rows:
        answers().print(_table(rows))
    else:
        say(f"no run below {root}; a Recorder makes one, and so does `diagnostics demo`")
    raise typer.Exit(code)


def _row(run_dir: Path, root: Path) -> dict[str, Any]:
    manifest = read_manifest(run_dir)
    # The detectors beside the recorder leave their verdict in the manifest; reading it keeps a listing of
    # hundreds of runs fast. Only a run recorded without them, or so young that they have not spoken yet,
    # is judged here, from its tables.
    status = manifest.get("status")
    return {
        "name": short_name(run_dir, root),
        "state": live_state(manifest),
        "steps": manifest.get("steps"),
        "status": status if status in STATUS_STYLES and status != "no-data" else assess(run_dir).status,
        "path": str(run_dir),
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    table.add_column("state")
    table.add_column("steps", justify="right")
    table.add_column("status")
    for row in rows:
        steps = "unknown" if row["steps"] is None else str(row["steps"])
        table.add_row(
            row["name"], row["state"], steps, Text(row["status"], style=STATUS_STYLES[row["status"]])
        )
    return table
