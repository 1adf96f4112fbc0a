"""The vocabulary of commands: names, arguments, what is allowed. Used by both ends of the channel."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from diagnostics.errors import CommandError


@dataclass(frozen=True)
class Argument:
    """One argument: how to read it, and in words what is allowed."""

    read: Callable[[Any], Any]
    allowed: str


def _positive(value: Any) -> float:  # noqa: ANN401 - whatever JSON or a command line gives
    number = float(value)
    if not number > 0.0 or math.isnan(number):
        raise ValueError(value)
    return number


def _finite_positive(value: Any) -> float:  # noqa: ANN401 - as above
    number = _positive(value)
    if math.isinf(number):
        raise ValueError(value)
    return number


def _name(value: Any) -> str:  # noqa: ANN401 - as above
    if not isinstance(value, str) or not value:
        raise ValueError(value)
    return value


COMMANDS: dict[str, dict[str, Argument]] = {
    "spectral-bound": {
        "tau": Argument(_positive, "a number above 0, such as 0.01; inf observes without bounding")
    },
    "lr-scale": {"factor": Argument(_finite_positive, "a finite number above 0, such as 0.5")},
    "qk-clip": {"threshold": Argument(_finite_positive, "a finite number above 0, such as 100")},
    "disarm": {"name": Argument(_name, "the name of an armed remedy, such as spectral-bound")},
    "checkpoint": {},
    "stop": {},
    "status": {},
}


def check_command(command: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a command, read and checked.

    Raises:
        CommandError: an unknown command; a missing, unknown or impossible argument.
    """
    if command not in COMMANDS:
        raise CommandError(f"there is no command {command!r}; the commands are {', '.join(COMMANDS)}")
    known = COMMANDS[command]
    if unknown := sorted(set(arguments) - set(known)):
        takes = ", ".join(known) or "no arguments"
        raise CommandError(f"{command} does not take {unknown[0]!r}; it takes {takes}")
    checked: dict[str, Any] = {}
    for name, argument in known.items():
        if name not in arguments:
            raise CommandError(f"{command} needs {name}: {argument.allowed}")
        try:
            checked[name] = argument.read(arguments[name])
        except (TypeError, ValueError):
            raise CommandError(
                f"{command}: {name} is {arguments[name]!r}, it must be {argument.allowed}"
            ) from None
    return checked


def as_typed(command: str, arguments: Mapping[str, Any], run: str = "RUN") -> str:
    """The command line that sends this command, for advice and suggestions."""
    return f"diagnostics control {run} {command}{_options(command, arguments)}"


def _options(command: str, arguments: Mapping[str, Any]) -> str:
    # Also of arguments that check_command refuses, so that a refusal can name them.
    if command == "disarm" and set(arguments) == {"name"}:
        return f" {arguments['name']}"
    return "".join(
        f" --{name} {value:g}" if isinstance(value, int | float) else f" --{name} {value}"
        for name, value in arguments.items()
    )
