"""Writing a run directory: rows are buffered, then written as whole part files by one background thread.

A part file is written under a temporary name, fsynced and renamed: a reader or a kill meets a complete file
or none. The training thread only appends to a bounded queue; where the disk cannot keep up, rows of measured
steps are thinned before training waits, and the thinning is counted.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from diagnostics.store.format import SCHEMAS, TEMPORARY_SUFFIX, part_name

Row = dict[str, Any]


class PartWriter:
    """Buffers rows per table and writes them as part files; single-threaded, knows no queue.

    Args:
        run_dir: the run directory; table folders are made as needed.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._rows: dict[str, list[Row]] = {table: [] for table in SCHEMAS}
        # A scalar once seen keeps its column in every later part, so that globbing readers agree on columns.
        self._scalars: list[str] = []
        self._number = 0

    def add(self, table: str, rows: Sequence[Row]) -> None:
        self._rows[table].extend(rows)

    @property
    def pending(self) -> int:
        """Rows not written yet."""
        return sum(len(rows) for rows in self._rows.values())

    def flush(self) -> None:
        """Writes every buffered row; a table whose file fails keeps its rows."""
        for table, rows in self._rows.items():
            if rows:
                self._write_part(table, rows)
                rows.clear()

    def _write_part(self, table: str, rows: list[Row]) -> None:
        schema = SCHEMAS[table]
        if table == "steps":
            for row in rows:
                self._scalars += [
                    name for name in row if name not in schema.names and name not in self._scalars
                ]
            for name in self._scalars:
                schema = schema.append(pa.field(name, pa.float64(), metadata={"meaning": "user scalar"}))
        folder = self._run_dir / table
        folder.mkdir(exist_ok=True)
        steps = [row["step"] for row in rows]
        path = folder / part_name(min(steps), max(steps), self._number)
        self._number += 1
        temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
        with temporary.open("wb") as file:
            pq.write_table(pa.Table.from_pylist(rows, schema=schema), file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


class Worker:
    """The background thread: runs jobs in the order they were handed over, and `idle` in between.

    Args:
        contained: runs a callable so that its faults go to the recorder's border, and says whether it worked.
        idle: called about every `idle_period_s` and after each burst of jobs.
        idle_period_s: seconds.
        capacity: jobs that may wait; `offer` refuses beyond it.
    """

    def __init__(
        self,
        *,
        contained: Callable[[Callable[[], None]], bool],
        idle: Callable[[], None],
        idle_period_s: float = 0.2,
        capacity: int = 4096,
    ) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(capacity)
        self._contained = contained
        self._idle = idle
        self._idle_period_s = idle_period_s
        # Daemon: a training process that ends without close() must be able to exit.
        self._thread = threading.Thread(target=self._run, name="diagnostics-writer", daemon=True)
        self._thread.start()

    def offer(self, job: Callable[[], None]) -> bool:
        """Hands over a job without waiting; False where the queue is full and the job was not taken."""
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    def stop(self, last: Callable[[], None], timeout_s: float = 60.0) -> None:
        """Finishes the queue, runs `last` and ends the thread; gives up waiting after `timeout_s`."""
        try:
            self._jobs.put(last, timeout=timeout_s)
            self._jobs.put(None, timeout=timeout_s)
        except queue.Full:
            return
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _run(self) -> None:
        next_idle_s = time.monotonic() + self._idle_period_s
        while True:
            wait_s = next_idle_s - time.monotonic()
            # A burst of jobs must not starve the heartbeat, so the clock is looked at after each job too.
            if wait_s <= 0.0:
                self._contained(self._idle)
                next_idle_s = time.monotonic() + self._idle_period_s
                continue
            try:
                job = self._jobs.get(timeout=wait_s)
            except queue.Empty:
                continue
            if job is None:
                return
            self._contained(job)
