"""`diagnostics list ROOT`: the runs below a directory."""

from typing import Annotated, Any

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from diagnostics.errors import NewerSchemaError, NotARunError
from diagnostics.store.manifest import live_state, read_manifest
from diagnostics.store.place import place

from .choice import Root, runs_below, short_name
from .exits import OK, USAGE
from .output import answers, print_json, say
from .words import STATUS_STYLES


def list_runs(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="A directory or URI that holds runs.")],
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
        # The document's keys are a contract; the attempt is told to people, and to programs by run.json.
        print_json({"runs": [{key: row[key] for key in row if key != "attempt"} for row in rows]})
    elif rows:
        answers().print(_table(rows))
    else:
        say(f"no run below {root}; a Recorder makes one, and so does `diagnostics demo`")
    raise typer.Exit(code)


def _row(run_dir: Root, root: Root) -> dict[str, Any]:
    manifest = read_manifest(place(run_dir))
    # The detectors beside the recorder leave their verdict in the manifest; reading it keeps a listing of
    # hundreds of runs fast. Only a run recorded without them, or so young that they have not spoken yet,
    # is judged here, from its tables.
    status = manifest.get("status")
    return {
        "name": short_name(run_dir, root),
        "state": live_state(manifest),
        "steps": manifest.get("steps"),
        "status": status if status in STATUS_STYLES and status != "no-data" else _judged(run_dir),
        "attempt": manifest.get("attempt", 1),
        "path": str(run_dir),
    }


def _judged(run_dir: Root) -> str:
    from diagnostics.report import assess  # noqa: PLC0415 - brings pandas, which most listings need not wait for

    return assess(run_dir).status


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("run", overflow="fold")
    table.add_column("state")
    table.add_column("steps", justify="right")
    table.add_column("status")
    for row in rows:
        steps = "unknown" if row["steps"] is None else str(row["steps"])
        again = f", attempt {row['attempt']}" if row["attempt"] != 1 else ""
        table.add_row(
            row["name"], row["state"] + again, steps, Text(row["status"], style=STATUS_STYLES[row["status"]])
        )
    return table
