"""A set of whole numbers as spans of them: the steps that were handed out, the steps that a table covers."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt


class Spans:
    """Spans of steps, first and last inclusive, disjoint and in order."""

    def __init__(self, spans: Iterable[tuple[int, int]] = ()) -> None:
        self._firsts: list[int] = []
        self._lasts: list[int] = []
        for first, last in spans:
            self.add(first, last)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(zip(self._firsts, self._lasts, strict=True))

    def __repr__(self) -> str:
        return f"Spans({list(self)})"

    @property
    def last(self) -> int | None:
        """The largest step; None without any."""
        return self._lasts[-1] if self._lasts else None

    def add(self, first: int, last: int) -> None:
        """Adds the steps from `first` to `last`; spans that touch become one."""
        low, high = bisect_left(self._lasts, first - 1), bisect_right(self._firsts, last + 1)
        if low < high:
            first, last = min(first, self._firsts[low]), max(last, self._lasts[high - 1])
        self._firsts[low:high], self._lasts[low:high] = [first], [last]

    def remove(self, first: int, last: int) -> None:
        """Takes out the steps from `first` to `last`."""
        kept = []
        for begin, end in self:
            kept += [(begin, min(end, first - 1)), (max(begin, last + 1), end)]
        self._firsts = [begin for begin, end in kept if begin <= end]
        self._lasts = [end for begin, end in kept if begin <= end]

    def cut(self, end: int) -> None:
        """Takes out every step from `end` on."""
        self.remove(end, max(end, self._lasts[-1] if self._lasts else end))

    def close(self) -> None:
        """Makes it one span, from the smallest step to the largest."""
        self._firsts, self._lasts = self._firsts[:1], self._lasts[-1:]

    def holds(self, first: int, last: int) -> bool:
        """Whether every step from `first` to `last` is in."""
        return self.last_of(first) is not None and self._lasts[bisect_left(self._lasts, first)] >= last

    def last_of(self, step: int) -> int | None:
        """The last step of the span that holds `step`; None where none does."""
        at = bisect_left(self._lasts, step)
        return self._lasts[at] if at < len(self._lasts) and self._firsts[at] <= step else None

    def holding(self, step_n: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of the steps are in."""
        firsts, lasts = np.array(self._firsts, np.int64), np.array(self._lasts, np.int64)
        if not len(firsts):
            return np.zeros(len(step_n), np.bool_)
        at_n = np.searchsorted(lasts, step_n)
        inside_n = at_n < len(lasts)
        return inside_n & (firsts[np.minimum(at_n, len(firsts) - 1)] <= step_n)

    def gaps(self, first: int, last: int) -> list[tuple[int, int]]:
        """The spans of steps from `first` to `last` that are not in."""
        rest = Spans([(first, last)]) if first <= last else Spans()
        for begin, end in self:
            if begin <= last and end >= first:
                rest.remove(begin, end)
        return list(rest)
