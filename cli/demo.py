"""`diagnostics demo`: trains the demonstration runs, prints their reports, serves the dashboard on them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.table import Table
from rich.text import Text

from diagnostics.errors import DiagnosticsError
from diagnostics.report import Report, assess
from diagnostics.store.read import open_run

from .dashboard import serve
from .exits import OK
from .output import answers
from .progress import Progress, last
from .words import STATUS_STYLES, number, print_report

_OUT = Path("runs") / "demo"


def demo(
    *,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the runs are written.")] = _OUT,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps of each run.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="N", help="Seed of the weights and of the data order.")
    ] = 0,
    no_dashboard: Annotated[bool, typer.Option("--no-dashboard", help="End after the reports.")] = False,
) -> None:
    """Train the demonstration runs and show them.

    A small GPT is trained on real text in several arms; then their reports are printed and the dashboard is served.
    """
    # The one verb that trains, and so the one that needs torch; all others work without it installed.
    try:
        from diagnostics.demo.main import run_demo  # noqa: PLC0415 - see above
        from diagnostics.demo.verdict import verdict  # noqa: PLC0415 - see above
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise DiagnosticsError(
            "the demonstration trains, which needs PyTorch: pip install torch; all other verbs work without it"
        ) from None
    run_dirs = run_demo(out, steps=steps, seed=seed)
    console = answers()
    reports = [assess(run_dir) for run_dir in run_dirs]
    for report, run_dir in zip(reports, run_dirs, strict=True):
        print_report(console, report, run_dir)
        console.print()
    console.print(_table(run_dirs, reports))
    for sentence in verdict(run_dirs):
        console.print(sentence, soft_wrap=True)
    # A collapsing arm is what the demonstration is for: its finding is no reason for a code other than 0.
    raise typer.Exit(OK if no_dashboard else serve(out))


def _table(run_dirs: Sequence[Path], reports: Sequence[Report]) -> Table:
    # Entropy, SEC and logit are of the last measured step, as the loss is of the last steps: how each arm ended.
    table = Table(box=box.SIMPLE_HEAD, title="how each arm ended", title_justify="left")
    table.add_column("arm", overflow="fold")
    for heading in ("final loss", "lowest entropy (nats)", "mean SEC", "largest logit"):
        table.add_column(heading, justify="right")
    table.add_column("status")
    for run_dir, report in zip(run_dirs, reports, strict=True):
        progress = Progress()
        progress.read(open_run(run_dir))
        cells = (
            progress.final_loss(),
            *(last(series) for series in (progress.entropy, progress.sec, progress.logit)),
        )
        table.add_row(
            report.run,
            *(number(cell) for cell in cells),
            Text(report.status, style=STATUS_STYLES[report.status]),
        )
    return table
