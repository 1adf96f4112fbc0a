"""Running the command in this process: exit code, stdout and stderr apart."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from diagnostics.cli.main import main


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def diagnostics(capsys: pytest.CaptureFixture[str]) -> Command:
    def run(*arguments: object) -> Ended:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(code, captured.out, captured.err)

    return run
