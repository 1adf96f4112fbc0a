"""Rows of the recent past, appended to without copying the past each time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[Any]


class Ring:
    """The newest rows of an array that only grows at its end.

    Args:
        empty: an array of no rows: its dtype, and the shape of a row.
    """

    def __init__(self, empty: Rows) -> None:
        self._buffer = empty
        self._first = self._end = 0

    def __len__(self) -> int:
        return self._end - self._first

    @property
    def rows(self) -> Rows:
        """The rows held, oldest first: a view, good until the next `append`."""
        return self._buffer[self._first : self._end]

    def append(self, rows: Rows) -> Rows:
        """Adds rows and returns all that are held."""
        if self._end + len(rows) > len(self._buffer):
            held = self.rows
            grown = np.empty((2 * (len(held) + len(rows)), *self._buffer.shape[1:]), dtype=self._buffer.dtype)
            grown[: len(held)] = held
            self._buffer, self._first, self._end = grown, 0, len(held)
        self._buffer[self._end : self._end + len(rows)] = rows
        self._end += len(rows)
        return self.rows

    def keep(self, newest: int) -> None:
        """Forgets all rows but the newest."""
        self._first = max(self._first, self._end - newest)

    def widen(self, columns: NDArray[np.int64], width: int) -> None:
        """Spreads the columns of 2-d rows to new places among `width`; NaN in the others."""
        wider = np.full((len(self), width), np.nan)
        wider[:, columns] = self.rows
        self._buffer, self._first, self._end = wider, 0, len(wider)
