"""The arithmetic of coarse tables: numbers of many rows, and of many buckets, as those of coarser buckets.

A raw row is a bucket of one value, so that one function, `combined`, makes every resolution of every other.
Array names end in their axes: n rows, m metrics.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Buckets:
    """Statistics of some metrics over some buckets; float64 holds every float32 and int32 as it is.

    Attributes:
        metrics: names along axis m.
        step_n: first step of each bucket.
        key_n: number of each bucket's key.
        count_mn: finite values.
        nonfinite_mn: values that are NaN or infinite.
        min_mn: smallest finite value; +inf without one.
        max_mn: largest finite value; -inf without one.
        mean_mn: mean of the finite values; 0 without one.
        last_mn: last value, finite or not; anything without one.
        any_mn: whether there is a value at all.
    """

    metrics: tuple[str, ...]
    step_n: Ints
    key_n: Ints
    count_mn: Ints
    nonfinite_mn: Ints
    min_mn: Floats
    max_mn: Floats
    mean_mn: Floats
    last_mn: Floats
    any_mn: Bools

    @classmethod
    def of(
        cls,
        step_n: Ints,
        key_n: Ints,
        metrics: Sequence[str],
        columns: Mapping[str, Sequence[pa.ChunkedArray]],
    ) -> "Buckets":
        """Buckets as the columns of a coarse table hold them, by statistic and in the order of `metrics`."""
        rows = len(step_n)
        values = {name: _values(column, rows)[0] for name, column in columns.items()}
        count_mn = np.nan_to_num(values["count"]).astype(np.int64)
        some_mn = count_mn > 0
        return cls(
            tuple(metrics),
            step_n,
            key_n,
            count_mn,
            np.nan_to_num(values["nonfinite"]).astype(np.int64),
            np.where(some_mn, values["min"], np.inf),
            np.where(some_mn, values["max"], -np.inf),
            np.where(some_mn, values["mean"], 0.0),
            values["last"],
            _values(columns["last"], rows)[1],
        )

    def where(self, chosen_n: Bools) -> "Buckets":
        """The chosen buckets, in their order."""
        return Buckets(
            self.metrics,
            self.step_n[chosen_n],
            self.key_n[chosen_n],
            *(matrix[:, chosen_n] for matrix in self._matrices()),
        )

    def with_metrics(self, metrics: Sequence[str]) -> "Buckets":
        """The same buckets with these metrics, which hold nothing where they are new."""
        if self.metrics == tuple(metrics):
            return self
        at = [metrics.index(name) for name in self.metrics]
        matrices = []
        for matrix, nothing in zip(
            self._matrices(), (0, 0, np.inf, -np.inf, 0.0, np.nan, False), strict=True
        ):
            wider = np.full((len(metrics), len(self.step_n)), nothing, matrix.dtype)
            wider[at] = matrix
            matrices.append(wider)
        return Buckets(tuple(metrics), self.step_n, self.key_n, *matrices)

    def column(self, metric: str, statistic: str, kind: pa.DataType) -> pa.Array:
        """One column of a coarse table."""
        row = self.metrics.index(metric)
        values_n = getattr(self, f"{statistic}_mn")[row]
        if statistic in ("count", "nonfinite"):
            return pa.array(values_n.astype(np.int32))
        missing_n = ~self.any_mn[row] if statistic == "last" else self.count_mn[row] == 0
        # A number too large for its column, which no recorder writes, becomes an infinity there as in a raw one.
        with np.errstate(over="ignore"):
            narrow_n = np.where(missing_n, 0.0, values_n).astype(kind.to_pandas_dtype())
        return pa.array(narrow_n, kind, mask=missing_n if missing_n.any() else None)

    def _matrices(self) -> tuple[npt.NDArray[Any], ...]:
        return (
            self.count_mn,
            self.nonfinite_mn,
            self.min_mn,
            self.max_mn,
            self.mean_mn,
            self.last_mn,
            self.any_mn,
        )


def lifted(step_n: Ints, key_n: Ints, metrics: Sequence[str], columns: Sequence[pa.ChunkedArray]) -> Buckets:
    """Raw rows, each as a bucket of its own."""
    value_mn, any_mn = _values(columns, len(step_n))
    finite_mn = np.isfinite(value_mn)
    return Buckets(
        tuple(metrics),
        step_n,
        key_n,
        finite_mn.astype(np.int64),
        (any_mn & ~finite_mn).astype(np.int64),
        np.where(finite_mn, value_mn, np.inf),
        np.where(finite_mn, value_mn, -np.inf),
        np.where(finite_mn, value_mn, 0.0),
        value_mn,
        any_mn,
    )


def joined(pieces: Sequence[Buckets], metrics: Sequence[str]) -> Buckets:
    """All pieces' buckets, one piece after the other."""
    alike = [piece.with_metrics(metrics) for piece in pieces]
    if len(alike) == 1:
        return alike[0]
    matrices = zip(*(piece._matrices() for piece in alike), strict=True)  # noqa: SLF001 - the class's own module
    return Buckets(
        tuple(metrics),
        np.concatenate([piece.step_n for piece in alike]),
        np.concatenate([piece.key_n for piece in alike]),
        *(np.concatenate(same, axis=1) for same in matrices),
    )


def combined(buckets: Buckets, resolution: int) -> Buckets:
    """The buckets of `resolution` steps that these make up, sorted by step and key number."""
    if not len(buckets.step_n):
        return buckets
    start_n = buckets.step_n // resolution * resolution
    order_n = np.lexsort((buckets.step_n, buckets.key_n, start_n))
    start_n, key_n = start_n[order_n], buckets.key_n[order_n]
    changes_n = np.concatenate([[True], (start_n[1:] != start_n[:-1]) | (key_n[1:] != key_n[:-1])])
    edges = np.flatnonzero(changes_n)
    group_n = np.cumsum(changes_n) - 1
    count_mn = buckets.count_mn[:, order_n]
    total_mg = np.add.reduceat(count_mn, edges, axis=1)
    # Shares of the mean rather than a sum to be divided: the sum of finite values may not be finite.
    share_mn = count_mn / np.maximum(total_mg, 1)[:, group_n]
    min_mg = np.minimum.reduceat(buckets.min_mn[:, order_n], edges, axis=1)
    max_mg = np.maximum.reduceat(buckets.max_mn[:, order_n], edges, axis=1)
    with np.errstate(over="ignore"):
        mean_mg = np.add.reduceat(buckets.mean_mn[:, order_n] * share_mn, edges, axis=1)
    # Rounding must not carry the mean of equal values off them.
    mean_mg = np.where(total_mg > 0, np.minimum(np.maximum(mean_mg, min_mg), max_mg), 0.0)
    told_mn = np.where(buckets.any_mn[:, order_n], np.arange(len(order_n)), -1)
    last_mg = np.maximum.reduceat(told_mn, edges, axis=1)
    return Buckets(
        buckets.metrics,
        start_n[edges],
        key_n[edges],
        total_mg,
        np.add.reduceat(buckets.nonfinite_mn[:, order_n], edges, axis=1),
        min_mg,
        max_mg,
        mean_mg,
        np.take_along_axis(buckets.last_mn[:, order_n], np.maximum(last_mg, 0), axis=1),
        last_mg >= 0,
    )


def _values(columns: Sequence[pa.ChunkedArray], rows: int) -> tuple[Floats, Bools]:
    """The columns' values, and which of them are not null."""
    value_mn = np.empty((len(columns), rows))
    any_mn = np.ones((len(columns), rows), np.bool_)
    for row, column in enumerate(columns):
        value_mn[row] = column.to_numpy()
        if column.null_count:
            any_mn[row] = column.is_valid().to_numpy()
    return value_mn, any_mn
