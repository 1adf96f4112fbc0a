"""Frames for the detectors: built row by row beside a live run, or read back from its tables.

Both ways give the same frames, so a replay raises the very alerts that were raised live.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from diagnostics.detect.frame import HEAD_COLUMNS, UPDATE_COLUMNS, Frame, Rows, Values
from diagnostics.store.read import Run

Row = Mapping[str, Any]


class FrameBuilder:
    """Collects the losses between measured steps and closes a frame at each."""

    def __init__(self) -> None:
        self._steps: list[int] = []
        self._losses: list[float | None] = []

    @property
    def open(self) -> bool:
        """Whether steps were added since the last frame."""
        return bool(self._steps)

    def add(self, step: int, loss: float | None) -> None:
        self._steps.append(step)
        self._losses.append(loss)

    def close(
        self,
        step: int,
        attention: Sequence[Row] = (),
        spectra: Sequence[Row] = (),
        updates: Sequence[Row] = (),
    ) -> Frame:
        frame = Frame(
            step=step,
            steps=np.array(self._steps, dtype=np.int64),
            losses=np.array([np.nan if loss is None else loss for loss in self._losses], dtype=np.float64),
            loss_given=np.array([loss is not None for loss in self._losses], dtype=np.bool_),
            attention=_rows(attention, _head_key, HEAD_COLUMNS["attention"]),
            spectra=_rows(spectra, _head_key, HEAD_COLUMNS["spectra"]),
            updates=_rows(updates, _parameter_key, UPDATE_COLUMNS),
        )
        self._steps, self._losses = [], []
        return frame

    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self._steps), "losses": list(self._losses)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._steps, self._losses = list(state["steps"]), list(state["losses"])


def frames_of(run: Run, up_to_step: int | None = None) -> Iterator[Frame]:
    """The frames of a stored run, in step order; none looks past `up_to_step` (inclusive).

    Losses after the last measured step make a frame of their own, as they do when a live run is closed.
    """
    steps = run.table("steps", ["step", "loss", "measured"], end_step=up_to_step)
    numbers: np.ndarray[Any, np.dtype[np.int64]] = steps.column("step").to_numpy()
    measured = steps.column("measured").to_numpy(zero_copy_only=False).astype(bool)
    loss = steps.column("loss")
    given = loss.is_valid().to_numpy(zero_copy_only=False)
    losses = loss.fill_null(np.nan).to_numpy()
    tables = {
        name: _ByStep(run.table(name, columns, end_step=up_to_step), keys)
        for name, columns, keys in (
            ("attention", ["step", "layer", "head", *HEAD_COLUMNS["attention"]], ("layer", "head")),
            ("spectra", ["step", "layer", "head", *HEAD_COLUMNS["spectra"]], ("layer", "head")),
            ("updates", ["step", "parameter", *UPDATE_COLUMNS], ("parameter",)),
        )
    }
    ends = np.flatnonzero(measured)
    if len(numbers) and (not len(ends) or ends[-1] != len(numbers) - 1):
        ends = np.append(ends, len(numbers) - 1)
    for table in tables.values():
        table.cut_at(numbers[ends])
    begin = 0
    for index, end in enumerate(ends):
        step = int(numbers[end])
        here = slice(begin, int(end) + 1)
        yield Frame(
            step=step,
            steps=numbers[here],
            losses=losses[here],
            loss_given=given[here],
            attention=tables["attention"].rows(index),
            spectra=tables["spectra"].rows(index),
            updates=tables["updates"].rows(index),
        )
        begin = int(end) + 1


class _ByStep:
    """A table sorted by step, cut into the rows of each frame's step."""

    def __init__(self, table: pa.Table, keys: tuple[str, ...]) -> None:
        self._steps: np.ndarray[Any, np.dtype[np.int64]] = table.column("step").to_numpy()
        self._edges: tuple[list[int], list[int]] = ([], [])
        encoded = [table.column(name).combine_chunks().dictionary_encode("encode") for name in keys]
        self._words = [column.dictionary.to_pylist() for column in encoded]
        self._codes = np.stack([column.indices.to_numpy().astype(np.int32) for column in encoded], axis=1)
        self._keys: dict[bytes, tuple[Any, ...]] = {}
        self._values: dict[str, Values] = {
            name: table.column(name).fill_null(np.nan).to_numpy().astype(np.float64)
            for name in table.column_names
            if name not in ("step", *keys)
        }

    def cut_at(self, steps: np.ndarray[Any, np.dtype[np.int64]]) -> None:
        """Finds the rows of every one of these steps."""
        first, last = (np.searchsorted(self._steps, steps, side).tolist() for side in ("left", "right"))
        self._edges = (first, last)

    def rows(self, index: int) -> Rows:
        """The rows of the step at `index` of those that were cut at."""
        first, last = self._edges[0][index], self._edges[1][index]
        if first == last:
            return Rows()
        codes = self._codes[first:last]
        # Nearly every step has the keys of the one before.
        keys = self._keys.get(codes.tobytes())
        if keys is None:
            columns = [
                [words[code] for code in column]
                for words, column in zip(self._words, codes.T.tolist(), strict=True)
            ]
            keys = tuple(columns[0]) if len(columns) == 1 else tuple(zip(*columns, strict=True))
            self._keys[codes.tobytes()] = keys
        return Rows(keys, {name: values[first:last] for name, values in self._values.items()})


def _head_key(row: Row) -> tuple[str, int]:
    return row["layer"], row["head"]


def _parameter_key(row: Row) -> str:
    return str(row["parameter"])


def _rows(rows: Sequence[Row], key_of: Any, columns: Sequence[str]) -> Rows:  # noqa: ANN401 - one of the two above
    if not rows:
        return Rows()
    ordered = sorted(rows, key=key_of)  # the order in which a reader gets them
    values = {}
    for name in columns:
        column = [np.nan if row.get(name) is None else row[name] for row in ordered]
        # The tables hold float32: what is judged live must be what is read back.
        values[name] = np.array(column, dtype=np.float32).astype(np.float64)
    return Rows(tuple(key_of(row) for row in ordered), values)
