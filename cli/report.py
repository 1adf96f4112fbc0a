"""`diagnostics report PATH`: a verdict on one run, or on each run below a directory."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated

import typer
from rich.console import Console

from diagnostics.errors import NewerSchemaError, NotARunError
from diagnostics.report import assess

from .choice import Root, runs_named_by, short_name
from .exits import USAGE, exit_code, worst
from .judging import Judged, judge, judge_each, unjudged
from .output import answers, print_json, say
from .summary import Entry, counts, print_summary, worst_first
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
    found = _judged(run_dirs, up_to_step)
    for judged in found:
        if judged.trouble is not None:
            # Beside readable runs an unreadable one must not hide them, nor vanish from the document.
            say(judged.trouble)
    if as_json:
        print_json({"runs": [judged.report.to_dict() for judged in found]})
    elif len(found) == 1:
        print_report(answers(), found[0].report, run_dirs[0], info=found[0].info)
    else:
        _print_several(answers(), found, path)
    raise typer.Exit(
        worst(
            exit_code(judged.report.status, fail_on.value) if judged.trouble is None else USAGE
            for judged in found
        )
    )


def _judged(run_dirs: Sequence[Root], up_to_step: int | None) -> list[Judged]:
    if len(run_dirs) > 1:
        with _progress(len(run_dirs)) as told:
            return judge_each(run_dirs, up_to_step, assess, told)
    try:
        return [judge(run_dirs[0], up_to_step, assess)]
    except (NotARunError, NewerSchemaError) as error:
        return [unjudged(run_dirs[0], error)]


def _print_several(console: Console, found: Sequence[Judged], root: Root) -> None:
    entries = worst_first([Entry(short_name(judged.run_dir, root), judged) for judged in found])
    print_summary(console, entries)
    for entry in entries:
        if entry.status != "healthy":
            console.print()
            judged = entry.judged
            print_report(console, judged.report, judged.run_dir, name=entry.name, info=judged.info)
    console.print()
    console.print(counts(entries), soft_wrap=True)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr where somebody looks at it."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn  # noqa: PLC0415 - for a screen only

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("judging", total=total)
        yield lambda done: progress.update(task, completed=done)
