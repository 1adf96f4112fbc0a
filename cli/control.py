"""`diagnostics control RUN COMMAND`: sends a command to a live run and shows what the run did with it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from diagnostics.control.commands import COMMANDS, check_command
from diagnostics.control.mailbox import await_acknowledgement, send
from diagnostics.errors import CommandError
from diagnostics.store.manifest import read_manifest
from diagnostics.store.place import place
from diagnostics.store.remote.folder import shown_uri

from .exits import FOUND, OK
from .output import answers, say
from .words import number


# One command with every option instead of a sub-command each: RUN stands before COMMAND, where a group of
# commands would take RUN for the name of one. What goes together is checked below, from the vocabulary itself.
def control(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The directory of a live run.")],
    command: Annotated[str, typer.Argument(metavar="COMMAND", help=", ".join(COMMANDS))],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="disarm: the remedy to take off.")
    ] = None,
    *,
    tau: Annotated[float | None, typer.Option(help="spectral-bound: largest sigma1(dW) / sigma1(W).")] = None,
    factor: Annotated[
        float | None, typer.Option(help="lr-scale: what to multiply the learning rate by.")
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="qk-clip: the largest logit to allow.")] = None,
) -> None:
    """Send COMMAND to a live run, wait for its answer.

    Exit code: 0 applied, 1 rejected by the run or expired, 2 malformed or not a live run.
    """
    given = {"name": name, "tau": tau, "factor": factor, "threshold": threshold}
    arguments = {key: value for key, value in given.items() if value is not None}
    _check_as_typed(command, arguments)
    run_dir = _run_dir(run)
    identity = send(run_dir, command, arguments)
    say(f"{command} sent to {run_dir}, waiting for its next step")
    raise typer.Exit(_show(command, await_acknowledgement(run_dir, identity)))


def _run_dir(run: str) -> Path:
    """The directory of a run on this machine: commands are files, which a store only gets a copy of, if at all."""
    where = place(run)
    if where.local is not None:
        return where.local
    told = read_manifest(where)
    raise CommandError(
        f"commands go to the machine that records the run, not to {shown_uri(run)}; on {told.get('host')} type: "
        f"diagnostics control {shlex.quote(str(told.get('spool') or 'RUN'))} COMMAND"
    )


def _check_as_typed(command: str, arguments: Mapping[str, Any]) -> None:
    """Says in the words of the command line what check_command() would say of JSON keys."""
    if command in COMMANDS:
        known = COMMANDS[command]
        if unknown := sorted(set(arguments) - set(known)):
            takes = " and ".join(_typed(name) for name in known) or "no arguments"
            raise CommandError(f"{command} does not take {_typed(unknown[0])}; it takes {takes}")
        if missing := [name for name in known if name not in arguments]:
            raise CommandError(f"{command} needs {_typed(missing[0])}: {known[missing[0]].allowed}")
    check_command(command, arguments)


def _typed(argument: str) -> str:
    return "NAME" if argument == "name" else f"--{argument}"


def _show(command: str, answer: Mapping[str, Any]) -> int:
    console = answers()
    status, reason = answer["status"], answer.get("reason")
    at = "" if answer.get("step") is None else f" at step {answer['step']}"
    console.print(f"{command} {status}{at}{f': {reason}' if reason else ''}", soft_wrap=True)
    for line in _changes(answer.get("before"), answer.get("after")):
        console.print(f"  {line}", soft_wrap=True)
    return OK if status == "applied" else FOUND


def _changes(before: Any, after: Any) -> list[str]:  # noqa: ANN401 - what a remedy reports is its own
    if not isinstance(before, Mapping) or not isinstance(after, Mapping):
        return (
            [] if before is None and after is None else [f"before: {number(before)}; after: {number(after)}"]
        )
    if not before:  # `status` changes nothing and has only something to tell
        return [f"{key}: {number(value)}" for key, value in after.items()]
    lines = []
    for key in dict.fromkeys([*before, *after]):
        old, new = (number(side[key]) if key in side else "none" for side in (before, after))
        lines.append(f"{key}: {old}" if old == new else f"{key}: {old} -> {new}")
    return lines
