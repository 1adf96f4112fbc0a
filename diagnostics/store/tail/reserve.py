"""Room on the disk that is kept for run.json to say that the disk is full."""

import os
from contextlib import suppress
from pathlib import Path

from diagnostics.store.format import MANIFEST, TAIL

_LEAST_BYTES = 64 * 1024
# run.json is written anew beside the old one, with the fault's traceback in it.
_TIMES = 2


class Reserve:
    """A file that is there to be removed when the disk is full.

    Args:
        run_dir: the run directory.
        rank: rank of the process in a distributed job.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._run_dir = run_dir
        self._path = run_dir / TAIL / f".reserve-{rank}"
        self._tried = False

    def take(self) -> None:
        """Takes the room, once; where there is none, or no way to take it, nothing is kept."""
        if self._tried or not hasattr(os, "posix_fallocate"):
            return
        self._tried = True
        with suppress(OSError):
            size = max(_LEAST_BYTES, _TIMES * (self._run_dir / MANIFEST).stat().st_size)
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                os.posix_fallocate(descriptor, 0, size)
            finally:
                os.close(descriptor)

    def give_back(self) -> None:
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
