"""The recent past of a run, and with it the window on every new block."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diagnostics.detect.block import ATTENTION, SPECTRA, UPDATES, Block, Key, Values
from diagnostics.detect.loss_course import LossCourse
from diagnostics.detect.per_step import PerStep
from diagnostics.detect.ring import Ring
from diagnostics.detect.window import GROWTH_STEPS, HELD_FRAMES, HELD_STEPS, Window

Flags = Mapping[str, frozenset[str]]
_MEDIAN = "loss_median"


def flags_of(sites: object) -> dict[str, frozenset[str]]:
    """Module path to flags, out of what run.json says of the attention sites; what is no such thing says nothing."""
    found = {}
    for site in sites if isinstance(sites, list | tuple) else ():
        flags = site.get("flags") if isinstance(site, Mapping) else None
        if isinstance(flags, list | tuple | set | frozenset):
            found[str(site.get("name"))] = frozenset(flag for flag in flags if isinstance(flag, str))
    return found


class History:
    """Holds what the rules look back on: 200 steps or 33 frames, whichever is more, and what is kept of the loss.

    Heads and parameters that appear later get columns of their own; what they were before is NaN.
    """

    def __init__(self) -> None:
        self._heads: tuple[Key, ...] = ()
        self._parameters: tuple[str, ...] = ()
        self._steps = Ring(np.empty(0, dtype=np.int64))
        self._columns: dict[str, Ring] = {
            name: Ring(np.empty((0, 0))) for name in (*ATTENTION, *SPECTRA, *UPDATES)
        }
        self._columns[_MEDIAN] = Ring(np.empty((0, 1)))
        self._loss = LossCourse()
        self._scalars = {name: PerStep() for name in ("grad_norm", "lr", "adam_rms")}
        self._first_step: int | None = None

    def window(self, block: Block, flags: Flags) -> Window:
        """Takes a block and returns the window on it, good until the next block comes."""
        self._forget()
        if self._first_step is None and len(block.every_step):
            self._first_step = int(block.every_step[0])
        self._take_in_keys(block)
        all_steps = self._steps.append(block.steps)
        columns: dict[str, Values] = {}
        at = _places(block.heads, self._heads)
        for name in (*ATTENTION, *SPECTRA):
            columns[name] = self._columns[name].append(_spread(block.head_column(name), at, len(self._heads)))
        at = _places(block.parameters, self._parameters)
        for name in UPDATES:
            columns[name] = self._columns[name].append(
                _spread(block.update_column(name), at, len(self._parameters))
            )
        self._loss.add(block)
        columns[_MEDIAN] = self._columns[_MEDIAN].append(self._loss.median[:, None])
        for name, scalar in self._scalars.items():
            values = block.scalar(name)
            scalar.add(block.every_step, values, np.isfinite(values), block.ends)
        window = Window(
            block=block, all_steps=all_steps, first_step=self._first_step or 0, heads=self._heads,
            parameters=self._parameters, loss=self._loss, columns=columns, flags=flags,
            grad_norm=self._scalars["grad_norm"], lr=self._scalars["lr"], adam_rms=self._scalars["adam_rms"],
        )  # fmt: skip
        self._loss.compare(window.ago(_MEDIAN, GROWTH_STEPS)[:, 0])
        return window

    def _forget(self) -> None:
        steps = self._steps.rows
        if not len(steps):
            return
        within = len(steps) - int(np.searchsorted(steps, steps[-1] - HELD_STEPS))
        held = max(HELD_FRAMES, within)
        for ring in (self._steps, *self._columns.values()):
            ring.keep(held)

    def _take_in_keys(self, block: Block) -> None:
        if block.heads != self._heads and not set(block.heads) <= set(self._heads):
            union = tuple(sorted({*self._heads, *block.heads}))
            at = _places(self._heads, union)
            assert at is not None
            for name in (*ATTENTION, *SPECTRA):
                self._columns[name].widen(at, len(union))
            self._heads = union
        if block.parameters != self._parameters and not set(block.parameters) <= set(self._parameters):
            together = tuple(sorted({*self._parameters, *block.parameters}))
            at = _places(self._parameters, together)
            assert at is not None
            for name in UPDATES:
                self._columns[name].widen(at, len(together))
            self._parameters = together

    def state_dict(self) -> dict[str, Any]:
        self._forget()
        return {
            "heads": [list(key) for key in self._heads],
            "parameters": list(self._parameters),
            "first_step": self._first_step,
            "steps": self._steps.rows.tolist(),
            "columns": {name: ring.rows.tolist() for name, ring in self._columns.items()},
            "loss": self._loss.state_dict(),
            "scalars": {name: scalar.state_dict() for name, scalar in self._scalars.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._heads = tuple((str(layer), int(head)) for layer, head in state["heads"])
        self._parameters = tuple(state["parameters"])
        self._first_step = state["first_step"]
        self._steps = Ring(np.empty(0, dtype=np.int64))
        self._steps.append(np.array(state["steps"], dtype=np.int64))
        for name in self._columns:
            rows = np.array(state["columns"][name], dtype=np.float64)
            width = 1 if name == _MEDIAN else len(self._parameters if name in UPDATES else self._heads)
            self._columns[name] = Ring(np.empty((0, width)))
            self._columns[name].append(rows.reshape(len(state["steps"]), width))
        self._loss.load_state_dict(state["loss"])
        for name, scalar in self._scalars.items():
            scalar.load_state_dict(state["scalars"][name])


def _places(keys: tuple[Any, ...], among: tuple[Any, ...]) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """The column of each key among all; None where they are the same."""
    if keys == among:
        return None
    index = {key: place for place, key in enumerate(among)}
    return np.array([index[key] for key in keys], dtype=np.int64)


def _spread(values: Values, at: np.ndarray[Any, np.dtype[np.int64]] | None, width: int) -> Values:
    if at is None:
        return values
    spread = np.full((len(values), width), np.nan)
    spread[:, at] = values
    return spread
