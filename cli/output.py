"""The two streams: answers on stdout, everything said about them on stderr."""

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

import numpy as np
from rich.console import Console

from diagnostics.errors import DamagedDataWarning, RecorderWarning

# Rich takes 80 columns where there is no terminal and would cut paths short in a pipe or a log.
_PIPED_COLUMNS = 200


class _Answers(Console):
    """A console whose reader may leave: Rich itself would exit with 1, which here means a finding."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        _write_into_nothing()


def answers() -> Console:
    """The console for what was asked for. Made anew each time: tests and pipes exchange `sys.stdout`."""
    width = None if sys.stdout.isatty() else _PIPED_COLUMNS
    return _Answers(file=sys.stdout, width=width, highlight=False, markup=False, emoji=False)


@contextmanager
def readers_may_leave() -> Iterator[None]:
    """`diagnostics report ... | head` has read enough: what follows goes nowhere, and the verdict stands."""
    try:
        yield
    except BrokenPipeError:
        _write_into_nothing()


def _write_into_nothing() -> None:
    # Not just dropped: Python flushes stdout once more when it exits, and would complain then.
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def say(message: str) -> None:
    """One line for people, on stderr, so that stdout stays one document under --json."""
    print(f"diagnostics: {' '.join(message.split())}", file=sys.stderr, flush=True)


def print_json(document: Mapping[str, Any]) -> None:
    """The one JSON document of a `--json` verb."""
    text = json.dumps(_strict(document), indent=1, allow_nan=False, default=str)
    with readers_may_leave():
        print(text)


def _strict(value: Any) -> Any:  # noqa: ANN401 - whatever a finding's evidence holds
    """NaN and infinity are no JSON: a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _strict(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Shows each Python warning as one line on stderr, without file, line number and source."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        del category, filename, lineno, file, line
        say(f"warning: {message}")

    with warnings.catch_warnings():
        # Ours are always news; everyone else's keep the filters that Python was started with.
        warnings.simplefilter("always", DamagedDataWarning)
        warnings.simplefilter("always", RecorderWarning)
        warnings.showwarning = show
        yield
