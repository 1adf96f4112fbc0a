"""What was read or worked out and stays until something changes: the newest value of each key, within bounds."""

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import pandas as pd

T = TypeVar("T")

# Of frames alone; curves and reports are small beside them.
MOST_BYTES = 2**30


@dataclass(frozen=True)
class Kept:
    """A value, the stamp of what it was made of, how long that took, and when it was done (monotonic)."""

    stamp: Hashable
    value: Any
    cost_s: float
    at_s: float


class Same:
    """A stamp that is the same as long as it is made of the very same objects.

    Args:
        objects: kept alive by the stamp, so that no new one can be mistaken for one of them.
    """

    def __init__(self, objects: Iterable[object]) -> None:
        self._objects = tuple(objects)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Same)
            and len(self._objects) == len(other._objects)
            and all(mine is its for mine, its in zip(self._objects, other._objects, strict=True))
        )

    def __hash__(self) -> int:
        return hash(tuple(map(id, self._objects)))


class Keeper:
    """Values by key; what was asked for longest ago goes first.

    Args:
        most: values kept at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, Kept] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def last(self, key: Hashable) -> Kept | None:
        """What is kept of a key, of whatever stamp."""
        return self._kept.get(key)

    def get(self, key: Hashable, stamp: Hashable, compute: Callable[[], T]) -> T:
        """The value of a key as of a stamp, worked out where it is not kept."""
        kept = self._kept.get(key)
        if kept is not None and kept.stamp == stamp:
            self._kept.move_to_end(key)
            return kept.value  # type: ignore[no-any-return]
        begun_s = time.monotonic()
        value = compute()
        now_s = time.monotonic()
        self._put(key, Kept(stamp, value, now_s - begun_s, now_s))
        return value

    def adopt(self, other: "Keeper") -> None:
        """Takes over all that another one keeps."""
        for key, kept in other._kept.items():  # noqa: SLF001 - one of its own kind
            self._put(key, kept)

    def _put(self, key: Hashable, kept: Kept) -> None:
        self._kept[key] = kept
        self._kept.move_to_end(key)
        sizes = [_bytes(one.value) for one in self._kept.values()]
        while len(sizes) > self._most or (len(sizes) > 1 and sum(sizes) > MOST_BYTES):
            self._kept.popitem(last=False)
            sizes.pop(0)


def _bytes(value: object) -> int:
    return int(value.memory_usage(deep=False).sum()) if isinstance(value, pd.DataFrame) else 0
