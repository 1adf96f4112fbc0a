"""`diagnostics report PATH`: a verdict on one run, or on each run below a directory."""

from enum import StrEnum
from typing import Annotated

import typer

from diagnostics.errors import NewerSchemaError, NotARunError
from diagnostics.report import Report, assess

from .choice import runs_named_by, short_name
from .exits import USAGE, exit_code, worst
from .output import answers, print_json, say
from .words import print_report


class FailOn(StrEnum):
    """The mildest status that makes the exit code 1."""

    AT_RISK = "at-risk"
    COLLAPSED = "collapsed"
    DIVERGED = "diverged"


def report(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="A run, or a directory or URI that holds runs.")
    ],
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    fail_on: Annotated[
        FailOn, typer.Option(help="The mildest status that makes the exit code 1.")
    ] = FailOn.AT_RISK,
    up_to_step: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="Judge as if the run had only come to step N.")
    ] = None,
) -> None:
    """Judge one run, or each run below PATH.

    Says what is wrong, in which layer and head, since which step, with what evidence, and what to do.

    Exit code: 0 nothing at or above --fail-on, 1 a finding there, 2 wrong usage or an unreadable path, 3 no data.
    """
    run_dirs = runs_named_by(path)
    reports, codes = [], []
    for run_dir in run_dirs:
        try:
            judged = assess(run_dir, up_to_step=up_to_step)
        except (NotARunError, NewerSchemaError) as error:
            # Beside readable runs an unreadable one must not hide them, nor vanish from the document.
            say(str(error))
            judged = Report(
                run=short_name(run_dir, run_dir), status="no-data", step=None, missing=(str(error),)
            )
            codes.append(USAGE)
        else:
            codes.append(exit_code(judged.status, fail_on.value))
        reports.append(judged)
    if as_json:
        print_json({"runs": [judged.to_dict() for judged in reports]})
    else:
        console = answers()
        for index, (judged, run_dir) in enumerate(zip(reports, run_dirs, strict=True)):
            if index:
                console.print()
            print_report(console, judged, run_dir)
    raise typer.Exit(worst(codes))
