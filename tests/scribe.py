"""A recorder without a model: rows are put on record one by one, and its process dies between any two file operations.

A death is a copy of the run directory as it was at that instant: what was in files survives, nothing else does,
and no lock is held on the copy. What the copy must show is kept here as plain rows.
"""

import math
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import nn

from diagnostics.attach.site import Sites
from diagnostics.record.claim import Claim, claim_run_dir
from diagnostics.record.stream import Cadence, Stream
from diagnostics.store.tail.frames import NULL, PENDING

Row = dict[str, Any]
LAYERS = ("a", "b")
PARAMETERS = ("a.weight", "b.weight")


@dataclass(frozen=True)
class Arriving:
    """A value that was on its way from a device: a death at that moment leaves it, or a null."""

    value: float


@dataclass
class Attempt:
    """What one attempt put on record, by table."""

    rows: dict[str, list[Row]] = field(
        default_factory=lambda: {"steps": [], "attention": [], "spectra": [], "updates": [], "events": []}
    )

    @property
    def first_step(self) -> int | None:
        return self.rows["steps"][0]["step"] if self.rows["steps"] else None


def _contained(job: Callable[..., None], *arguments: Any) -> bool:
    # A disk that is full breaks nothing here: the next flush has the rows.
    with suppress(OSError):
        job(*arguments)
    return True


def _contained_for(_: str, job: Callable[..., None], *arguments: Any) -> bool:
    job(*arguments)
    return True


class Scribe:
    """Records into a run directory by hand.

    Args:
        run_dir: claimed as a Recorder claims it.
        attempts: what earlier attempts put on record there.
        every: steps between two measured ones, as coarse tables understand it.
        segment_bytes: size of a step segment.
    """

    def __init__(
        self,
        run_dir: Path,
        attempts: list[Attempt] | None = None,
        *,
        every: int = 2,
        segment_bytes: int = 1024,
    ) -> None:
        self.run_dir = run_dir
        self.claim: Claim = claim_run_dir(
            run_dir, model=nn.Linear(1, 1), config=None, every=every, control="off", sites=Sites()
        )
        # Attempts that recorded nothing may have been written down before a death, or not.
        self.attempts = list(attempts or [])
        while self.attempts and not any(self.attempts[-1].rows.values()):
            self.attempts.pop()
        known = len(self.claim.manifest["attempts"])
        assert known > len(self.attempts), f"attempt {known}, though {len(self.attempts)} recorded something"
        self.attempts += [Attempt() for _ in range(known - len(self.attempts))]
        self._pending: dict[int, dict[str, float]] = {}
        self._gone = False
        self.stream = Stream(
            self.run_dir,
            self.claim.manifest,
            every=every,
            attempt=self.claim.attempt,
            number=self.claim.number,
            detectors=False,
            on_commands=lambda: None,
            contained=_contained,
            contained_for=_contained_for,
            fetched=self._fetched,
            # Flushed by hand only.
            cadence=Cadence(1e6, 1e6, 10**9, 0.2, segment_bytes),
        )
        # Merged by hand only: a copy made beside a merge would be of no instant.
        self.stream._merger.poke = lambda: None  # type: ignore[method-assign]
        self.stream.start()
        self.next_step = 0

    @property
    def _now(self) -> Attempt:
        return self.attempts[-1]

    def step(
        self,
        loss: float | None,
        scalars: Mapping[str, float | None],
        *,
        late: Mapping[str, float] | None = None,
    ) -> None:
        """Puts one step on record.

        Args:
            loss: null, a number, or none.
            scalars: the user's.
            late: scalars, `loss` perhaps among them, that lie on a device still.
        """
        late = late or {}
        step, self.next_step = self.next_step, self.next_step + 1
        given = {"loss": loss, **scalars}
        told = {name: NULL if value is None else value for name, value in given.items()}
        told |= dict.fromkeys(late, PENDING)
        names = tuple(name for name in told if name != "loss")
        if late:
            self._pending[step] = dict(late)
        self.stream.log.append(
            step, 1e9 + step, 1e-3, False, told["loss"], 0.1, names, [told[name] for name in names]
        )
        self._now.rows["steps"].append(
            {"step": step, "lr": 0.1, "measured": False, **given, **dict.fromkeys(late)}
        )

    def settled(self) -> None:
        """What was on its way has arrived: to be called after each operation that nobody died in."""
        for attempt in self.attempts:
            for row in attempt.rows["steps"]:
                row |= {name: value.value for name, value in row.items() if isinstance(value, Arriving)}

    def measure(self, value: float) -> None:
        """Puts the rows of the last step on record, as a measured step's."""
        if not self._now.rows["steps"]:
            return
        step = self._now.rows["steps"][-1]["step"]
        if any(row["step"] == step for row in self._now.rows["attention"]):
            return
        rows: dict[str, list[Row]] = {
            "attention": [
                {"step": step, "layer": layer, "head": head, "entropy": value, "rows": step + head}
                for layer in LAYERS
                for head in range(2)
            ],
            "spectra": [
                {
                    "step": step,
                    "layer": layer,
                    "head": 0,
                    "sigma1": None,
                    "singular_values": [2.0 + step, 0.25],
                }
                for layer in LAYERS
            ],
            "updates": [{"step": step, "parameter": name, "ratio": step / 8} for name in PARAMETERS],
        }
        self.stream.absorb(up_to=step)
        for table, table_rows in rows.items():
            self.stream._writer.add(table, table_rows)
            self._now.rows[table] += table_rows

    def event(self, message: str, step: int) -> None:
        self.stream.announce("alert", "warning", message, {"step": step})
        self.stream._take_events()
        self._now.rows["events"].append({"step": step, "kind": "alert", "message": message})

    def look(self) -> None:
        self.stream.absorb()
        self.stream.log.prepare()

    def flush(self, failing: str | None = None) -> None:
        """Writes what is on record to part files; those of a table that fails stay in the tail until the next time."""
        writer = self.stream._writer
        write_part = type(writer)._write_part

        def write(table: str, rows: pa.Table, number: int) -> None:
            if table == failing:
                raise OSError(28, "no space left on device")
            write_part(writer, table, rows, number)

        writer._write_part = write  # type: ignore[method-assign]
        self.stream.flush()

    def go_back(self, step: int) -> None:
        """A new attempt in the same process, as after `load_state_dict` with an earlier step."""
        self.stream.begin_attempt(step)
        self.stream._disk.wait(60)
        self.attempts.append(Attempt())
        self.next_step = step

    @property
    def waiting(self) -> int | None:
        """The first step with a scalar that lies on a device still."""
        return min(self._pending, default=None)

    def let_go(self) -> None:
        """Ends the threads; writes nothing more. Idempotent."""
        if not self._gone:
            self._gone = True
            self.stream.release()
            self.claim.release()

    def die(self, into: Path) -> None:
        """Leaves a copy of the run directory as it is at this instant."""
        copy(self.run_dir, into)
        self.let_go()

    def _fetched(self, up_to: int) -> dict[int, dict[str, float]]:
        found = {step: values for step, values in self._pending.items() if step <= up_to}
        for step, values in found.items():
            del self._pending[step]
            row = next(row for row in self._now.rows["steps"] if row["step"] == step)
            row |= {name: Arriving(value) for name, value in values.items()}
        return found


def copy(run_dir: Path, into: Path) -> None:
    """The directory as a death now would leave it; files that go meanwhile are gone."""
    into.mkdir(parents=True)
    for name in os.listdir(run_dir):  # noqa: PTH208 - as cheap as can be, within a hook
        source = run_dir / name
        if source.is_dir() and not source.is_symlink():
            copy(source, into / name)
        else:
            with suppress(FileNotFoundError):
                shutil.copyfile(source, into / name)


class _Deaths:
    """Copies a directory at the chosen one of the file operations in it."""

    def __init__(self) -> None:
        self.watched = ""
        self.into = Path()
        self.left = -1
        self.copying = False
        sys.addaudithook(self._on_event)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watched or self.copying or event not in {"open", "os.rename", "os.remove"}:
            return
        if not isinstance(arguments[0], str | os.PathLike) or not os.fspath(arguments[0]).startswith(
            self.watched
        ):
            return
        self.left -= 1
        if self.left == 0:
            self.copying = True
            copy(Path(self.watched), self.into)
            self.copying = False


_DEATHS: list[_Deaths] = []


def died() -> bool:
    """Whether the last block of `dying_at` got as far as its operation."""
    return _DEATHS[0].left <= 0


@contextmanager
def dying_at(run_dir: Path, operation: int, into: Path) -> Any:
    """Copies the directory at the n-th file operation within the block, counted from 1; else at its end."""
    if not _DEATHS:
        _DEATHS.append(_Deaths())  # a hook stays until the interpreter ends
    deaths = _DEATHS[0]
    deaths.watched, deaths.into, deaths.left = str(run_dir), into, operation
    try:
        yield
    finally:
        deaths.watched = ""
    if not into.exists():
        copy(run_dir, into)


def same_value(left: Any, right: Any) -> bool:
    """Whether a value read is the one put on record; null is not NaN, -0.0 is not 0.0."""
    if isinstance(right, Arriving):
        return left is None or same_value(left, right.value)
    if isinstance(left, float) and isinstance(right, float):
        return (math.isnan(left) and math.isnan(right)) or (
            left == right and math.copysign(1, left) == math.copysign(1, right)
        )
    return bool(left == right)
