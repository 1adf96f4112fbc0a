"""A recorder without a model: drives the store's writing parts as a recording process does, one call at a time."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from synthetic import HEADS, LAYERS, PARAMETERS, manifest

from diagnostics.store.format import MANIFEST
from diagnostics.store.parts.merge import Part, finish_interrupted, folders, merge
from diagnostics.store.tail.decode import Row
from diagnostics.store.tail.frames import NULL, PENDING
from diagnostics.store.tail.settle import settle
from diagnostics.store.tail.step_log import StepLog
from diagnostics.store.write import PartWriter

SEGMENT_BYTES = 512  # a few steps, so that a generation has several segments


def say(run_dir: Path, **changes: Any) -> None:
    """Writes run.json."""
    run_dir.mkdir(exist_ok=True)
    (run_dir / MANIFEST).write_text(json.dumps(manifest("run", **{"state": "running", **changes})))


class ScriptedWriter:
    """One attempt of one rank.

    Args:
        run_dir: the run directory; run.json is not written here.
        attempt: the attempt.
        rank: the rank.
        number: number of the first flush.
        every: steps between measured ones; None: no coarse tables.
    """

    def __init__(
        self, run_dir: Path, attempt: int = 1, rank: int = 0, number: int = 0, every: int | None = None
    ) -> None:
        run_dir.mkdir(exist_ok=True)
        self.run_dir = run_dir
        self.log = StepLog(run_dir, attempt=attempt, rank=rank, number=number, segment_bytes=SEGMENT_BYTES)
        self.parts = PartWriter(run_dir, attempt=attempt, rank=rank, number=number, every=every)
        self.pending: dict[int, float] = {}
        self._rng = np.random.default_rng(1000 * attempt + rank)

    def step(
        self,
        step: int,
        *,
        measured: bool = False,
        pending: bool = False,
        scalars: Mapping[str, float] | None = None,
    ) -> None:
        """Closes a step; a loss that is pending becomes known with `absorb`."""
        loss = float(self._rng.random())
        names = tuple(scalars or ())
        if pending:
            self.pending[step] = loss
        values = [*(scalars or {}).values()]
        self.log.append(
            step,
            1e9 + step,
            1e-6,
            measured,
            PENDING if pending else loss,
            1e-3 if step % 5 else NULL,
            names,
            values,
        )
        if measured:
            self.absorb()
            self.measure(step)

    def measure(self, step: int) -> None:
        """Rows of a measured step."""
        heads = [(layer, head) for layer in LAYERS for head in range(HEADS)]
        keys = [{"step": step, "layer": layer, "head": head} for layer, head in heads]
        self.parts.add("attention", [{**key, "entropy": self._value(), "max_logit": 1.0} for key in keys])
        self.parts.add(
            "spectra", [{**key, "sec_1": self._value(), "singular_values": [2.0, 0.5]} for key in keys]
        )
        self.parts.add(
            "updates", [{"step": step, "parameter": name, "ratio": self._value()} for name in PARAMETERS]
        )

    def _value(self) -> float:
        return float(np.float32(self._rng.normal()))

    def event(self, step: int, message: str) -> None:
        row = {"step": step, "time_s": 1e9 + float(self._rng.random()), "kind": "warning", "severity": "info"}
        self.parts.add("events", [{**row, "message": message, "data": "{}", "layer": None, "head": None}])

    def absorb(self, before: int | None = None) -> None:
        rows = self.log.read_new(before)
        completed: list[Row] = []
        for row in rows:
            if row["step"] in self.pending:
                row["loss"] = self.pending.pop(row["step"])
                completed.append(row)
        self.parts.add_logged_steps(rows, completed)

    def flush(self) -> None:
        self.absorb()
        if not self.parts.pending:
            return
        number = self.parts.number + 1
        assert self.log.rotate(number)
        self.absorb(before=number)
        flush = self.parts.begin_flush()
        flush.segments += self.log.retire(number)
        self.parts.write(flush)
        self.log.prepare()

    def die(self) -> None:
        """Ends as a killed process does: files stay as they are."""
        for segment in {*self.log._unread, *self.log._kept, self.log._segment}:
            segment.close()
        if self.log._spare is not None:
            self.log._spare.close()
        self.parts.close()

    def resumed(self, attempt: int, every: int | None = None) -> "ScriptedWriter":
        """The next attempt at the run, after this one died."""
        settle(self.run_dir, 0)
        return ScriptedWriter(self.run_dir, attempt, number=self.parts.number + 1, every=every)


def merge_some(run_dir: Path, count: int, *, killed: bool = False) -> int:
    """Merges the first `count` parts of one writer and level in every folder; returns how many merges there were.

    With `killed` the parts that were merged are still there, as after a kill before they were removed.
    """
    done = 0
    for folder in folders(run_dir):
        finish_interrupted(folder)
        groups: dict[tuple[int, int, int], list[Part]] = {}
        for part in folder.parts():
            groups.setdefault((part.name.attempt, part.name.rank, part.name.merges), []).append(part)
        for group in groups.values():
            if len(group) >= 2:
                contents = {part.path: part.path.read_bytes() for part in group[:count]}
                merge(group[:count])
                for path, content in contents.items() if killed else ():
                    path.write_bytes(content)
                done += 1
    return done
