"""Blocks for the detectors, read back from a stored run: the arrays that the live run was judged by."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from diagnostics.detect.block import ATTENTION, SCALARS, SPECTRA, UPDATES, Block, Bools, Ints, Values
from diagnostics.store.read import Run

FRAMES = 2048
CELLS = 500_000
"""Frames of a block, and heads times frames: more would save no time, and take memory in a long run of a large model."""


def blocks_of(run: Run, up_to_step: int | None = None) -> Iterator[Block]:
    """The frames of a stored run, in step order; none looks past `up_to_step` (inclusive).

    Steps after the last measured one make a frame of their own, as they do when a live run is closed.
    """
    steps = run.table("steps", None, end_step=up_to_step)
    every_step: Ints = steps.column("step").to_numpy()
    if not len(every_step):
        return
    measured = steps.column("measured").to_numpy(zero_copy_only=False).astype(bool)
    losses, given = _numbers(steps, "loss")
    scalars = {name: _numbers(steps, name)[0] for name in SCALARS}
    ends = np.flatnonzero(measured) + 1
    if not len(ends) or ends[-1] != len(every_step):
        ends = np.append(ends, len(every_step))
    attention = _Table(run.table("attention", ["step", "layer", "head", *ATTENTION], end_step=up_to_step), 2)
    spectra = _Table(run.table("spectra", ["step", "layer", "head", *SPECTRA], end_step=up_to_step), 2)
    updates = _Table(run.table("updates", ["step", "parameter", *UPDATES], end_step=up_to_step), 1)
    heads = tuple(sorted({*attention.keys, *spectra.keys}))
    begin = 0
    frames_each = min(FRAMES, max(1, CELLS // max(1, len(heads))))
    for first in range(0, len(ends), frames_each):
        block_ends = ends[first : first + frames_each]
        here = slice(begin, int(block_ends[-1]))
        frames = every_step[block_ends - 1]
        yield Block(
            steps=frames,
            measured=measured[block_ends - 1],
            every_step=every_step[here],
            ends=block_ends - begin,
            losses=losses[here],
            loss_given=given[here],
            scalars={name: values[here] for name, values in scalars.items()},
            heads=heads,
            attention=attention.columns(frames, heads),
            spectra=spectra.columns(frames, heads),
            parameters=tuple(sorted(updates.keys)),
            updates=updates.columns(frames, tuple(sorted(updates.keys))),
        )
        begin = int(block_ends[-1])


def _numbers(table: pa.Table, name: str) -> tuple[Values, Bools]:
    """A column with NaN for null, and where it is not null."""
    if name not in table.column_names:
        return np.full(len(table), np.nan), np.zeros(len(table), dtype=np.bool_)
    column = table.column(name)
    known = column.is_valid().to_numpy(zero_copy_only=False).astype(np.bool_)
    return column.fill_null(np.nan).to_numpy().astype(np.float64), known


class _Table:
    """A table sorted by step, ready to be laid out by frame and key.

    Args:
        table: columns `step`, then the key, then numbers.
        key_columns: how many columns make the key.
    """

    def __init__(self, table: pa.Table, key_columns: int) -> None:
        names = table.column_names
        self._steps: Ints = table.column("step").to_numpy()
        encoded = [
            table.column(name).combine_chunks().dictionary_encode("encode")
            for name in names[1 : 1 + key_columns]
        ]
        words = [column.dictionary.to_pylist() for column in encoded]
        codes = np.zeros(len(table), dtype=np.int64)
        for column, known in zip(encoded, words, strict=True):
            codes = codes * max(len(known), 1) + column.indices.to_numpy().astype(np.int64)
        # Few codes are possible, so that counting them is faster than sorting the rows.
        distinct = np.flatnonzero(np.bincount(codes)) if len(codes) else codes
        self._codes = np.searchsorted(distinct, codes)
        self.keys = tuple(_key(int(code), words) for code in distinct)
        self._values = {name: _numbers(table, name)[0] for name in names[1 + key_columns :]}

    def columns(self, frames: Ints, keys: tuple[Any, ...]) -> dict[str, Values]:
        """(F, K) of each column, NaN where the table has no row; empty where it has none at all."""
        if not self.keys:
            return {}
        place = {key: index for index, key in enumerate(keys)}
        places = np.array([place[key] for key in self.keys], dtype=np.int64)
        first, last = (
            np.searchsorted(self._steps, frames[0]),
            np.searchsorted(self._steps, frames[-1], "right"),
        )
        rows = slice(int(first), int(last))
        frame = np.searchsorted(frames, self._steps[rows])
        exact = frames[np.minimum(frame, len(frames) - 1)] == self._steps[rows]
        at = (frame * len(keys) + places[self._codes[rows]])[exact]
        laid_out = {}
        for name, values in self._values.items():
            column = np.full(len(frames) * len(keys), np.nan)
            column[at] = values[rows][exact]
            laid_out[name] = column.reshape(len(frames), len(keys))
        return laid_out


def _key(code: int, words: list[list[Any]]) -> Any:  # noqa: ANN401 - a name, or layer and head
    parts = []
    for known in reversed(words):
        code, index = divmod(code, len(known))
        parts.append(known[index])
    return parts[0] if len(parts) == 1 else tuple(reversed(parts))
