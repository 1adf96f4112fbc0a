"""Recording processes that die, what they had promised by then, and whether a run's files keep it.

`Nursery` drives `nursery.py`. A step counts as promised once `recorder.step()` has returned, which the
recording process notes in memory that outlives it.
"""

import json
import math
import mmap
import os
import struct
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa

from diagnostics.store.format import TABLES
from diagnostics.store.read import Run, open_run

ACK = "<qd?"
ACKS_AT = 64
_MOST_ACKS = 20_000

MEASURED = {"attention": ("layer", "head"), "spectra": ("layer", "head"), "updates": ("parameter",)}
"""Tables of measured steps, and what one row of a step is of."""

# Clocks differ from one run to the next; all else of a row is a function of its step.
_CLOCKS = ("time_s", "overhead_s")


def noisy(step: int) -> float:
    """A scalar that is no number, not finite or a negative zero now and then."""
    special = {3: math.nan, 5: math.inf, 8: -math.inf, 11: -0.0}
    return special.get(step % 13, step * 0.25)


def late(step: int) -> float | None:
    """A scalar that appears in the middle of a run, and not in every step."""
    return math.sqrt(step) if step > 6 and step % 4 else None


@dataclass(frozen=True)
class Ack:
    """One step whose `recorder.step()` returned."""

    step: int
    loss: float | None


@dataclass
class Death:
    """How a recording process ended, and what it had promised.

    Attributes:
        acks: the promised steps, in order.
        signal: which signal ended it, 0 for none.
        code: its exit code where no signal ended it.
        ops: what it did to its run directory and how often, where it lived to tell.
        words: what it printed.
    """

    acks: list[Ack]
    signal: int
    code: int
    ops: dict[str, int]
    words: str

    @property
    def steps(self) -> list[int]:
        return [ack.step for ack in self.acks]


def promised(path: Path) -> list[Ack]:
    """The acknowledgements so far, of a process that lives or does not."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as acks:
        count = struct.unpack_from("<q", acks)[0]
        records = acks[ACKS_AT : ACKS_AT + count * struct.calcsize(ACK)]
    return [Ack(step, None if null else loss) for step, loss, null in struct.iter_unpack(ACK, records)]


class Nursery:
    """One prepared process that forks a recording process for every order; see nursery.py."""

    def __init__(self) -> None:
        alone = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **alone, "CUDA_VISIBLE_DEVICES": ""},
        )
        assert self._line() == "ready"
        self._sent: Path | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()

    def send(self, run_dir: Path, acks: Path, **order: Any) -> None:
        """Starts a recording process; `receive` waits until it is dead.

        Args:
            run_dir: where it records.
            acks: file for its acknowledgements, made here.
            **order: what differs from the defaults below.
        """
        acks.write_bytes(bytes(ACKS_AT + _MOST_ACKS * struct.calcsize(ACK)))
        full = {
            "run_dir": str(run_dir),
            "acks": str(acks),
            "steps": _MOST_ACKS,
            "every": 4,
            "kill": None,
            "ending": "close",
            "state": None,
            "save_every": 10,
            "resume": False,
            "cadence": QUICK,
            "ops": False,
            "die_at": None,
            **order,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(full) + "\n")
        self._process.stdin.flush()
        self._sent = acks

    def receive(self) -> Death:
        answer = json.loads(self._line())
        acks = self._sent
        assert acks is not None
        ops, words = acks.with_name(f"{acks.name}.ops"), acks.with_name(f"{acks.name}.err")
        status = answer["status"]
        return Death(
            promised(acks),
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0,
            code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else -1,
            ops=json.loads(ops.read_text()) if ops.exists() else {},
            words=words.read_text() if words.exists() else "",
        )

    def record(self, run_dir: Path, acks: Path, **order: Any) -> Death:
        self.send(run_dir, acks, **order)
        return self.receive()

    def _line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the nursery ended with {self._process.poll()}"
        return line.rstrip("\n")


QUICK: dict[str, Any] = {}
"""Flushes, rotations and merges every few milliseconds; see hurrying.py."""
CALM: dict[str, Any] = {"flush_s": 5.0, "idle_s": 0.02, "segment_bytes": 2**18, "fan_in": 16}
"""As users have it, but that training waits for the writer rather than thin a measured step."""


# --- what a run must show ---------------------------------------------------------------------------------


@dataclass
class Reference:
    """A run of the same training that nobody disturbed: what each row must be."""

    rows: dict[str, dict[int, dict[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)

    @classmethod
    def of(cls, run: Run) -> Self:
        return cls({table: by_step(run.table(table), keys) for table, keys in MEASURED.items()})


def by_step(table: pa.Table, keys: tuple[str, ...]) -> dict[int, dict[tuple[Any, ...], dict[str, Any]]]:
    """Rows by step and key; a key met twice in a step fails."""
    found: dict[int, dict[tuple[Any, ...], dict[str, Any]]] = {}
    for row in table.to_pylist():
        key = tuple(row[name] for name in keys)
        rows = found.setdefault(row["step"], {})
        assert key not in rows, f"step {row['step']} has {key} twice"
        rows[key] = row
    return found


def promised_measurements(acks: list[Ack], *, every: int, closed: bool = False) -> set[int]:
    """The measured steps whose rows must be there: the next measured step vouches for them, or a close."""
    measured = [ack.step for ack in acks if ack.step % every == 0]
    return set(measured if closed else measured[:-1])


def check_run(
    run: Run, acks: list[Ack], reference: Reference, *, every: int = 4, closed: bool = False
) -> None:
    """The run shows what was promised, once and only once, with the right values, and no damage.

    Args:
        run: as a reader opens it.
        acks: the steps it must show; one more, under way when the process died, it may.
        reference: the rows that measured steps must have.
        every: steps between measured ones.
        closed: whether the run was closed in order: then nothing may be missing.
    """
    check_steps(run.table("steps"), acks, every=every)
    check_measured(run, promised_measurements(acks, every=every, closed=closed), reference, every=every)
    check_events(run)
    assert run.damaged == {}


def check_events(run: Run) -> None:
    events = run.table("events").to_pylist()
    told = [(row["step"], row["kind"], row["message"], row["time_s"]) for row in events]
    assert len(set(told)) == len(told), f"events told twice: {told}"
    faults = [row["message"] for row in events if row["kind"] in {"fault", "warning"}]
    assert not faults, faults


def check_steps(table: pa.Table, acks: list[Ack], *, every: int) -> None:
    rows = table.to_pylist()
    steps = [row["step"] for row in rows]
    expected = [ack.step for ack in acks]
    under_way = [expected[-1] + 1] if expected else [steps[0]] if steps else []
    assert steps in (expected, expected + under_way), _difference(steps, expected)
    for row, ack in zip(rows, acks, strict=False):
        assert same(row["loss"], ack.loss), f"step {ack.step}: loss {row['loss']}, handed in {ack.loss}"
        assert row["lr"] == 0.1, row
    for row in rows:
        step = row["step"]
        assert same(row["noisy"], noisy(step)), f"step {step}: noisy {row['noisy']}"
        assert same(row.get("late"), late(step)), f"step {step}: late {row.get('late')}"
        assert row["measured"] == (step % every == 0), row
        assert (row["grad_norm"] is not None) == row["measured"], row
        assert row["time_s"] > 1.6e9, row


def check_measured(run: Run, due: set[int], reference: Reference, *, every: int) -> None:
    """Every measured step that is due has all its rows; no step has some of them, or others than it should."""
    recorded = {step for step in run.table("steps", ["step"]).column("step").to_pylist() if step % every == 0}
    for table, keys in MEASURED.items():
        found = by_step(run.table(table), keys)
        missing = sorted(due - found.keys())
        assert not missing, f"{table}: no rows of the steps {missing}, there are {sorted(recorded)}"
        assert found.keys() <= recorded, f"{table}: rows of steps not recorded: {found.keys() - recorded}"
        for step, rows in found.items():
            assert rows.keys() == reference.rows[table][step].keys(), f"{table}: step {step} is torn"
            for key, row in rows.items():
                assert _equal_rows(row, reference.rows[table][step][key]), (
                    f"{table} {step} {key}: {row}, not {reference.rows[table][step][key]}"
                )


def same(left: Any, right: Any) -> bool:
    """Equal to the bit, as far as Python can tell: null is not NaN, -0.0 is not 0.0."""
    if isinstance(left, float) and isinstance(right, float):
        if math.isnan(left) or math.isnan(right):
            return math.isnan(left) and math.isnan(right)
        return left == right and math.copysign(1, left) == math.copysign(1, right)
    return type(left) is type(right) and bool(left == right)


def _equal_rows(left: dict[str, Any], right: dict[str, Any]) -> bool:
    return left.keys() == right.keys() and all(
        all(map(same, left[name], right[name]))
        if isinstance(left[name], list)
        else same(left[name], right[name])
        for name in left
        if name not in _CLOCKS
    )


def _difference(found: list[int], expected: list[int]) -> str:
    counts = {step: found.count(step) for step in found}
    twice = sorted(step for step, count in counts.items() if count > 1)
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    return (
        f"{len(found)} steps for {len(expected)} acknowledged up to {expected[-1:]}; twice {twice[:20]}, "
        f"missing {missing[:20]}, extra {extra[:20]}, in order {found == sorted(found)}"
    )


def check_coarse(run: Run, resolution: int) -> None:
    """A coarse table is what its buckets of the run's own rows give, computed here once more."""
    for table, keys in {"steps": (), **MEASURED}.items():
        rows = run.table(table).to_pylist()
        found = run.coarse(table, resolution)
        buckets: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        for row in rows:
            bucket = row["step"] // resolution * resolution
            buckets.setdefault((bucket, *(row[key] for key in keys)), []).append(row)
        told = {tuple(row[key] for key in ("step", *keys)): row for row in found.to_dict("records")}
        assert len(told) == len(found), f"coarse {table}: a bucket is there twice"
        assert told.keys() == buckets.keys(), f"coarse {table}: {told.keys() ^ buckets.keys()}"
        numbers = [
            column.name for column in TABLES[table] if str(column.type) in {"double", "float", "int32"}
        ]
        for key, bucket_rows in buckets.items():
            for name in numbers:
                _check_bucket(f"coarse {table} {key} {name}", told[key], name, [r[name] for r in bucket_rows])


def _check_bucket(where: str, told: Mapping[Any, Any], name: str, values: list[float | None]) -> None:
    finite = [v for v in values if v is not None and math.isfinite(v)]
    given = [v for v in values if v is not None]
    assert told[f"{name}_count"] == len(finite), where
    assert told[f"{name}_nonfinite"] == len(given) - len(finite), where
    for what, value in {
        "min": min(finite, default=math.nan),
        "max": max(finite, default=math.nan),
        "mean": float(sum(map(Fraction, finite)) / len(finite)) if finite else math.nan,
        "last": given[-1] if given else math.nan,
    }.items():
        np.testing.assert_allclose(told[f"{name}_{what}"], value, rtol=1e-6, err_msg=f"{where}_{what}")


def tree(root: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder with its size and time of change: what a reader must leave as it is."""
    return {
        str(path.relative_to(root)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(root.rglob("*"))
    }


def opened(run_dir: Path, **view: Any) -> Run:
    """A run as a reader sees it, who has written nothing by looking."""
    before = tree(run_dir)
    run = open_run(run_dir, **view)
    for table in TABLES:
        run.table(table)
    assert tree(run_dir) == before, "a reader changed the run directory"
    return run
