"""Names of the files of a run's tail."""

import re
from dataclasses import dataclass

from diagnostics.store.format import writer_tag

_NAME = re.compile(
    r"(?P<kind>steps|rows)-(?P<number>\d+)(?:a(?P<attempt>\d+))?(?:r(?P<rank>\d+))?(?:-(?P<index>\d+))?\.log"
)


@dataclass(frozen=True, order=True)
class TailName:
    """A tail file's name: `steps-<number><tag>-<index>.log` or `rows-<number><tag>.log`.

    Attributes:
        kind: `steps` or `rows`.
        number: number of the flush that turns its rows into parts.
        attempt: which attempt at the run wrote it, counted from 1.
        rank: rank of the process in a distributed job.
        index: position of a step segment within its generation; 0 for a rows log.
    """

    kind: str
    number: int
    attempt: int = 1
    rank: int = 0
    index: int = 0

    def __str__(self) -> str:
        index = f"-{self.index:04d}" if self.kind == "steps" else ""
        return f"{self.kind}-{self.number:06d}{writer_tag(self.attempt, self.rank)}{index}.log"

    @classmethod
    def parse(cls, name: str) -> "TailName | None":
        """What a file's name says, or None for a name that is not a tail file's."""
        match = _NAME.fullmatch(name)
        if match is None or (match["kind"] == "steps") != (match["index"] is not None):
            return None
        kind, number, attempt, rank, index = match.groups()
        return cls(kind, int(number), int(attempt or 1), int(rank or 0), int(index or 0))
