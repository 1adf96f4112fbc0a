"""Rows in step order, however many files and sortings they come from."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from diagnostics.store.parts.read import NAMES

Ints = npt.NDArray[np.int64]

_KEYS = ("step", "layer", "head", "parameter")
_LARGEST = np.iinfo(np.int64).max


def in_step_order(rows: pa.Table) -> pa.Table:
    """The rows sorted by step, layer, head and parameter, as far as they have them; nulls last, else stable.

    Args:
        rows: layer and parameter as dictionaries, as parts/read.py gives them.
    """
    if rows.num_rows < 2:  # noqa: PLR2004 - one row is in order
        return rows
    if any(name in rows.column_names for name in NAMES):
        rows = rows.unify_dictionaries()
    keys = [_numbers(rows.column(name)) for name in _KEYS if name in rows.column_names]
    key_n = _as_one(keys)
    if key_n is None:
        return rows.take(pa.array(np.lexsort(keys[::-1])))
    if np.all(key_n[:-1] <= key_n[1:]):
        return rows
    # Merged parts are long runs of rows that are sorted already, which this sort makes use of.
    return rows.take(pa.array(np.argsort(key_n, kind="stable")))


def spelled_out(rows: pa.Table) -> pa.Table:
    """The rows with layer and parameter as strings again."""
    for index, name in enumerate(rows.column_names):
        column = rows.column(index)
        if name in NAMES and pa.types.is_dictionary(column.type):
            rows = rows.set_column(index, name, column.cast(pa.string()))
    return rows


def _numbers(column: pa.ChunkedArray) -> Ints:
    """Numbers that sort as the column's values do, nulls as the largest."""
    if not pa.types.is_dictionary(column.type):
        if not column.null_count:
            numbers: Ints = column.to_numpy().astype(np.int64, copy=False)
            return numbers
        valid_n = column.is_valid().to_numpy()
        return np.where(valid_n, column.fill_null(0).to_numpy().astype(np.int64), _LARGEST)
    names = column.chunk(0).dictionary.to_pylist() if column.num_chunks else []
    place_of = np.empty(len(names) + 1, np.int64)
    place_of[np.array(sorted(range(len(names)), key=lambda index: names[index]), np.int64)] = np.arange(
        len(names)
    )
    place_of[-1] = len(names)
    indices_n = np.concatenate([_indices(chunk) for chunk in column.chunks])
    ordered: Ints = place_of[indices_n]
    return ordered


def _indices(chunk: Any) -> Ints:  # noqa: ANN401 - pyarrow has no types
    """Indices into the dictionary, -1 for a null."""
    indices: Ints = chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return indices


def _as_one(keys: list[Ints]) -> Ints | None:
    """One number per row that sorts as the keys together do; None where 63 bits do not hold it."""
    whole = keys[0]
    room = int(whole.max()) - int(whole.min()) + 1
    whole = whole - int(whole.min())
    for key in keys[1:]:
        top = key == _LARGEST
        least = 0 if top.all() else int(key[~top].min())
        most = 0 if top.all() else int(key[~top].max())
        span = most - least + 2
        room *= span
        if room > _LARGEST:
            return None
        whole = whole * span + np.where(top, span - 1, key - least)
    return whole
