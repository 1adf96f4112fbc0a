"""Which process of a distributed job this is, and whether it records."""

import os
import re
from dataclasses import dataclass

import torch

from diagnostics.errors import DiagnosticsError

VARIABLE = "DIAGNOSTICS_RANKS"


@dataclass(frozen=True)
class Rank:
    """This process's place in its job.

    Attributes:
        number: from 0.
        count: processes in the job; 1 outside of one.
        records: whether it records: rank 0 does, others where DIAGNOSTICS_RANKS names them.
    """

    number: int
    count: int
    records: bool


def this_rank() -> Rank:
    """From `torch.distributed` where it is initialised, else from RANK and WORLD_SIZE as launchers set them.

    Raises:
        DiagnosticsError: RANK, WORLD_SIZE or DIAGNOSTICS_RANKS holds what cannot be understood.
    """
    number, count = _place()
    asked = _is_asked(number)
    return Rank(number, count, number == 0 or asked)


def _place() -> tuple[int, int]:
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    count = _whole("WORLD_SIZE", 1)
    return (_whole("RANK", 0), count) if count > 1 else (0, 1)


def _whole(variable: str, default: int) -> int:
    text = os.environ.get(variable, "").strip()
    if not text:
        return default
    if not re.fullmatch(r"\d+", text):
        raise DiagnosticsError(
            f"the environment variable {variable} is {text!r}, it must be a whole number, as launchers of distributed "
            "jobs set it; unset it outside of such a job"
        )
    return int(text)


def _is_asked(number: int) -> bool:
    text = os.environ.get(VARIABLE, "").strip()
    if text in ("", "all"):
        return bool(text)
    ranks = [each.strip() for each in text.split(",")]
    if not all(re.fullmatch(r"\d+", each) for each in ranks):
        raise DiagnosticsError(
            f"the environment variable {VARIABLE} is {text!r}, it must be 'all' or ranks such as '0,3': which processes "
            "of a distributed job record beside rank 0"
        )
    return number in map(int, ranks)
