"""Cached reads for the pages: what was read stays until the run's files say that there is more. No streamlit here.

A page that follows a live run is drawn every two seconds. Reading whole histories each time is what
makes other trackers' pages slow, so a table that only grew is read from its first new step on.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from diagnostics.report import Report, assess
from diagnostics.store.format import MANIFEST, SCHEMAS, TABLES, part_steps
from diagnostics.store.read import Run, open_run

from .summary import RunCurves, highest, last_value, lowest, run_curves

T = TypeVar("T")
Stamp = tuple[Any, ...]

# The long column of the widest table is read only for the head that is looked at.
_LIGHT_COLUMNS = {"spectra": [name for name in SCHEMAS["spectra"].names if name != "singular_values"]}
_REPLAY_SHARE = 20.0


@dataclass(frozen=True)
class _Kept:
    stamp: Stamp
    value: Any
    cost_s: float
    read_s: float


@dataclass(frozen=True)
class Digest:
    """A run in four values; None where nothing was observed.

    Attributes:
        status: the verdict's.
        last_loss: of the last step that has one.
        lowest_entropy: of any head at any step, nats.
        highest_sec: the highest mean SEC_1 over heads of any step.
    """

    status: str
    last_loss: float | None
    lowest_entropy: float | None
    highest_sec: float | None

    @classmethod
    def of(cls, report: Report, curves: RunCurves) -> "Digest":
        return cls(report.status, last_value(curves.loss), lowest(curves.entropy), highest(curves.sec_mean))


class Reader:
    """Reads runs and keeps the latest state of each; values handed out are shared and must not be changed."""

    def __init__(self, most_kept: int = 64) -> None:
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()
        self._most_kept = most_kept
        # One read at a time: sessions share what is kept, and two would read the same files twice.
        self._lock = threading.RLock()
        self._damaged: dict[str, dict[str, str]] = {}
        self._digests: dict[str, tuple[Stamp, Digest]] = {}

    def info(self, run_dir: Path) -> dict[str, Any]:
        """The manifest, with the judged state; small, so always read anew."""
        return open_run(run_dir).info

    def damaged(self, run_dir: Path) -> dict[str, str]:
        """Files of the run that could not be read so far, and why."""
        return dict(self._damaged.get(str(run_dir), {}))

    def table(self, run_dir: Path, name: str) -> pd.DataFrame:
        """A table without `singular_values`; `steps` has `loss_not_finite` besides: NaN apart from null."""
        with self._lock:
            stamp = _stamp(run_dir, (name,))
            kept = self._kept.get((str(run_dir), name))
            if kept is not None and kept.stamp != stamp and _only_grew(kept.stamp, stamp, kept.value):
                new = self._read_table(run_dir, name, int(kept.value["step"].iloc[-1]) + 1)
                grown: pd.DataFrame = (
                    pd.concat([kept.value, new], ignore_index=True) if len(new) else kept.value
                )
                return self._keep((str(run_dir), name), stamp, lambda: grown)
            return self._latest((str(run_dir), name), stamp, lambda: self._read_table(run_dir, name, None))

    def curves(self, run_dir: Path) -> RunCurves:
        """The per-step summary of a run."""
        tables = ("steps", "attention", "spectra", "updates")
        with self._lock:
            return self._latest(
                (str(run_dir), "curves"),
                _stamp(run_dir, tables),
                lambda: run_curves(*(self.table(run_dir, name) for name in tables)),
            )

    def report(self, run_dir: Path) -> Report:
        """The verdict; on a live run at most 1/20 of the time goes into judging, so it may lag: see `.step`."""
        key = (str(run_dir), "report")
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None and time.monotonic() - kept.read_s < _REPLAY_SHARE * kept.cost_s:
                return kept.value  # type: ignore[no-any-return]
            return self._latest(key, _stamp(run_dir, tuple(TABLES)), lambda: assess(run_dir))

    def digest(self, run_dir: Path, *, live: bool) -> Digest:
        """What the run list shows of a run.

        A run that has ended is read once, and only these four values of it are kept: a list of a
        thousand runs must not hold a thousand runs' tables.
        """
        if live:
            return Digest.of(self.report(run_dir), self.curves(run_dir))
        with self._lock:
            if not self.has_digest(run_dir):
                scratch = Reader()
                value = Digest.of(scratch.report(run_dir), scratch.curves(run_dir))
                self._digests[str(run_dir)] = (_manifest_stamp(run_dir), value)
            return self._digests[str(run_dir)][1]

    def has_digest(self, run_dir: Path) -> bool:
        """Whether the `digest` of a run that has ended is there without reading it."""
        kept = self._digests.get(str(run_dir))
        return kept is not None and kept[0] == _manifest_stamp(run_dir)

    def spectrum(self, run_dir: Path, layer: str, head: int) -> pd.DataFrame:
        """Singular values of one head: index step, columns 1, 2, ... (descending); NaN where not observed."""
        with self._lock:
            return self._latest(
                (str(run_dir), f"spectrum {layer} {head}"),
                _stamp(run_dir, ("spectra",)),
                lambda: self._read_spectrum(run_dir, layer, head),
            )

    def _read_table(self, run_dir: Path, name: str, start_step: int | None) -> pd.DataFrame:
        run = open_run(run_dir)
        table = run.table(name, _LIGHT_COLUMNS.get(name), start_step)
        self._note_damage(run)
        frame: pd.DataFrame = table.to_pandas()
        if name == "steps":
            loss = table.column("loss")
            frame["loss_not_finite"] = pc.and_(pc.is_valid(loss), pc.invert(pc.is_finite(loss))).fill_null(
                False
            )
        return frame

    def _read_spectrum(self, run_dir: Path, layer: str, head: int) -> pd.DataFrame:
        run = open_run(run_dir)
        table = run.table("spectra", ["step", "layer", "head", "singular_values"])
        self._note_damage(run)
        chosen = table.filter(
            pc.and_(pc.equal(table["layer"], layer), pc.equal(table["head"], pa.scalar(head, pa.int16())))
        )
        lists = [[] if values is None else values for values in chosen.column("singular_values").to_pylist()]
        width = max(map(len, lists), default=0)
        sigma_sk = np.full((len(lists), width), np.nan)
        for row, values in enumerate(lists):
            sigma_sk[row, : len(values)] = values
        index = pd.Index(chosen.column("step").to_numpy(), name="step")
        return pd.DataFrame(sigma_sk, index=index, columns=range(1, width + 1))

    def _note_damage(self, run: Run) -> None:
        self._damaged.setdefault(str(run.path), {}).update(run.damaged)

    def _latest(self, key: tuple[str, str], stamp: Stamp, compute: Callable[[], T]) -> T:
        kept = self._kept.get(key)
        if kept is not None and kept.stamp == stamp:
            self._kept.move_to_end(key)
            return kept.value  # type: ignore[no-any-return]
        return self._keep(key, stamp, compute)

    def _keep(self, key: tuple[str, str], stamp: Stamp, compute: Callable[[], T]) -> T:
        begun_s = time.monotonic()
        value = compute()
        now_s = time.monotonic()
        self._kept[key] = _Kept(stamp, value, now_s - begun_s, now_s)
        self._kept.move_to_end(key)
        while len(self._kept) > self._most_kept:
            self._kept.popitem(last=False)
        return value


def _stamp(run_dir: Path, tables: tuple[str, ...]) -> Stamp:
    """Changes whenever a table may have: part files never change once named, so their names are enough."""
    tail = _listing(run_dir / "tail", with_sizes=True)
    return (tail, tuple(_listing(run_dir / table) for table in tables), _birth(run_dir))


def _manifest_stamp(run_dir: Path) -> Stamp:
    status = (run_dir / MANIFEST).stat()
    return status.st_mtime_ns, status.st_size


def _listing(folder: Path, *, with_sizes: bool = False) -> frozenset[Any]:
    try:
        with os.scandir(folder) as entries:
            if with_sizes:
                return frozenset(
                    (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries
                )
            return frozenset(entry.name for entry in entries if entry.name.endswith(".parquet"))
    except FileNotFoundError:
        return frozenset()


def _birth(run_dir: Path) -> tuple[Any, Any]:
    # A run deleted and recorded anew at the same path may repeat its part names.
    info = open_run(run_dir).info
    return info.get("run_id"), info.get("started_s")


def _only_grew(old: Stamp, new: Stamp, frame: pd.DataFrame) -> bool:
    """Whether the new parts lie after everything read so far and nothing else changed."""
    (old_tail, (old_parts,), old_birth), (new_tail, (new_parts,), new_birth) = old, new
    if frame.empty or old_tail or new_tail or old_birth != new_birth or not old_parts <= new_parts:
        return False
    last_step = int(frame["step"].iloc[-1])
    ranges = [part_steps(name) for name in new_parts - old_parts]
    return all(steps is not None and steps[0] > last_step for steps in ranges)


READER = Reader()
