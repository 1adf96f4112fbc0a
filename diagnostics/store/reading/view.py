"""Which rows of a run with several attempts count: the last attempt that recorded a step has the say on it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from diagnostics.store.format import PartName


@dataclass(frozen=True)
class View:
    """The steps that are shown of each attempt.

    Attributes:
        starts: first step that each attempt recorded; an attempt without one hides nothing.
        attempt: the one attempt that is shown, whole; None: of every attempt the steps before all later starts.
    """

    starts: Mapping[int, int] = field(default_factory=dict)
    attempt: int | None = None

    def shows(self, attempt: int) -> bool:
        """Whether rows of the attempt are looked at at all."""
        return self.attempt is None or self.attempt == attempt

    def end(self, attempt: int) -> int | None:
        """The first step of the attempt that is hidden; None: none is."""
        if self.attempt is not None:
            return None if self.attempt == attempt else 0
        return min((start for later, start in self.starts.items() if later > attempt), default=None)

    def last(self, attempt: int, end_step: int | None) -> int | None:
        """The last step shown of the attempt within a range that ends with `end_step`; None: no limit."""
        hidden = self.end(attempt)
        ends = [end_step, None if hidden is None else hidden - 1]
        return min((end for end in ends if end is not None), default=None)


def first_steps(parts: Iterable[PartName], tail: Iterable[tuple[int, int]]) -> dict[int, int]:
    """First step of each attempt, from the names of its parts and from its rows in the tail.

    Args:
        parts: names of parts of the table `steps`.
        tail: attempt and first step of rows in the tail.
    """
    starts: dict[int, int] = {}
    for attempt, step in [*((part.attempt, part.first_step) for part in parts), *tail]:
        starts[attempt] = min(step, starts.get(attempt, step))
    return starts
