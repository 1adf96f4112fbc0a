"""Blocks of one frame each, built from the rows of a live run as they are written."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from diagnostics.detect.block import ATTENTION, SCALARS, SPECTRA, UPDATES, Block, Values

Row = Mapping[str, Any]


class FrameBuilder:
    """Collects the rows of steps and closes a frame at each measured one."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, float | None, list[float]]] = []

    @property
    def open(self) -> bool:
        """Whether steps were added since the last frame."""
        return bool(self._rows)

    def add(self, row: Row) -> None:
        """Takes a row of the table `steps`."""
        scalars = [np.nan if (value := row.get(name)) is None else value for name in SCALARS]
        self._rows.append((row["step"], row["loss"], scalars))

    def close(
        self,
        step: int,
        attention: Sequence[Row] = (),
        spectra: Sequence[Row] = (),
        updates: Sequence[Row] = (),
        *,
        measured: bool = True,
    ) -> Block:
        """The frame that ends with `step`, whether it was measured or the run ends there."""
        heads = tuple(sorted({_head_key(row) for row in (*attention, *spectra)}))
        parameters = tuple(sorted(_parameter_key(row) for row in updates))
        losses = [loss for _, loss, _ in self._rows]
        scalars = np.array([values for _, _, values in self._rows], dtype=np.float64).reshape(
            -1, len(SCALARS)
        )
        block = Block(
            steps=np.array([step], dtype=np.int64),
            measured=np.array([measured]),
            every_step=np.array([at for at, _, _ in self._rows], dtype=np.int64),
            ends=np.array([len(self._rows)], dtype=np.int64),
            losses=np.array([np.nan if loss is None else loss for loss in losses], dtype=np.float64),
            loss_given=np.array([loss is not None for loss in losses], dtype=np.bool_),
            scalars={name: np.ascontiguousarray(scalars[:, at]) for at, name in enumerate(SCALARS)},
            heads=heads,
            attention=_columns(attention, [_head_key(row) for row in attention], heads, ATTENTION),
            spectra=_columns(spectra, [_head_key(row) for row in spectra], heads, SPECTRA),
            parameters=parameters,
            updates=_columns(updates, [_parameter_key(row) for row in updates], parameters, UPDATES),
        )
        self._rows = []
        return block

    def state_dict(self) -> dict[str, Any]:
        return {"rows": [[step, loss, list(scalars)] for step, loss, scalars in self._rows]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._rows = [(step, loss, list(scalars)) for step, loss, scalars in state.get("rows", ())]


def _head_key(row: Row) -> tuple[str, int]:
    return row["layer"], row["head"]


def _parameter_key(row: Row) -> str:
    return str(row["parameter"])


def _columns(
    rows: Sequence[Row], keys: Sequence[Any], among: tuple[Any, ...], names: Sequence[str]
) -> dict[str, Values]:
    """(1, K) of each column; empty where there are no rows."""
    if not rows:
        return {}
    place = {key: index for index, key in enumerate(among)}
    at = [place[key] for key in keys]
    columns = {}
    for name in names:
        column = np.full(len(among), np.nan, dtype=np.float32)
        # The tables hold float32: what is judged live must be what is read back.
        column[at] = [np.nan if (value := row.get(name)) is None else value for row in rows]
        columns[name] = column.astype(np.float64)[None, :]
    return columns
