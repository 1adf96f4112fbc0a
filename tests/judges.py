"""Stand-ins for `assess` that another process can import, for tests of judging many runs."""

import os
import time
import warnings
from pathlib import Path

from diagnostics.errors import DamagedDataWarning
from diagnostics.report import Report
from diagnostics.store.read import Run


def healthy(run: Run, /, *, up_to_step: int | None) -> Report:
    return Report(run=run.name, status="healthy", step=up_to_step)


def where(run: Run, /, *, up_to_step: int | None) -> Report:
    """Says in which process it was asked, and warns of the run `odd`."""
    if run.name == "odd":
        warnings.warn("odd is damaged", DamagedDataWarning, stacklevel=2)
    return Report(run=run.name, status="healthy", step=up_to_step, missing=(str(os.getpid()),))


def troubled(run: Run, /, *, up_to_step: int | None) -> Report:
    """Dies of the run `killer`, fails at the run `faulty`."""
    if run.name == "killer":
        os._exit(9)
    if run.name == "faulty":
        raise KeyError("entropy")
    return healthy(run, up_to_step=up_to_step)


def endless(run: Run, /, *, up_to_step: int | None) -> Report:
    """Says that it has begun, and does not end."""
    assert isinstance(run.path, Path)
    (run.path / "begun").touch()
    time.sleep(600.0)
    return healthy(run, up_to_step=up_to_step)
