"""The recorder's thread: measured steps and rows go there, faults there save what they can, and it ends the run."""

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from diagnostics.border import Border
from diagnostics.record.measured_step import MeasuredStep
from diagnostics.record.stream import Stream
from diagnostics.record.update_sizes import UpdateSizes
from diagnostics.record.worker import Worker

# A worker that is still measuring is given a little time; one that waits for a disk has had it already, once.
_SLOT_WAIT_S = 1.0
_SLOT_WAIT_ON_DISK_S = 0.25
_JOB_WAIT_S = 60.0
_LOOK_S = 0.01


class Background:
    """Runs the stream's work on the writer's thread.

    Args:
        stream: owns the run directory's files.
        border: contains every fault met there.
    """

    def __init__(self, stream: Stream, border: Border) -> None:
        self._stream = stream
        self._border = border
        self._sizes = UpdateSizes()
        self._slot = threading.Semaphore(1)
        self._salvaged = False
        self._ending = False
        stream.start()
        self._worker = Worker(
            contained=self._on_worker_thread, idle=stream.idle, idle_period_s=stream.cadence.idle_s
        )

    def take(
        self,
        step: int,
        measured: MeasuredStep,
        sites: list[dict[str, object]],
        facts: dict[str, Any],
        contained_for: Callable[..., bool],
    ) -> None:
        """Takes a measured step over: measures its copies, writes its rows.

        Args:
            step: its number.
            measured: its copies.
            sites: what run.json says of the sites.
            facts: what else changes in run.json.
            contained_for: runs the measurements that are made at once, those of copies on a device.
        """
        # The copies of one measured step wait at most.
        lost = self._wait_for_slot()
        if lost is not None:
            self._stream.record_thinned(step, lost)
        if lost is not None or self._border.broken:
            return
        if measured.on_device:
            measured.complete(self._sizes, contained_for)

        def job() -> None:
            measured.complete(self._sizes, self._border.run_for)
            if self._border.broken:
                return  # what was measured since then is not whole
            self._stream.update_manifest(**facts)
            rows = self._stream.close_measured(step, measured, sites)
            # Not before the rows are on record: the next measured step vouches for them.
            self._slot.release()
            self._stream.watch(step, rows)

        if not self._worker.offer(job):
            self._slot.release()
            self._stream.record_thinned(step, "the writer cannot keep up")

    def wait_for(self, job: Callable[[], None]) -> None:
        """Has a job run on the worker's thread, after all that was handed over so far, and waits for it."""
        done = threading.Event()

        def run() -> None:
            try:
                job()
            finally:
                done.set()

        deadline_s = time.monotonic() + _JOB_WAIT_S
        if not self._ending and self._worker.offer(run):
            # Once recording is switched off no job is run any more.
            while not self._border.broken and time.monotonic() < deadline_s and not done.wait(_LOOK_S):
                pass

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}

        def take() -> None:
            state.update(stream=self._stream.state_dict(), updates=self._sizes.state_dict())

        # These belong to the worker: they are taken there, or once it is gone.
        if self._worker.gone:
            self._border.run(take)
        else:
            self.wait_for(take)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes what is there of what `state_dict` gave."""
        self.wait_for(lambda: self._stream.load_state_dict(state.get("stream")))
        if "updates" in state:
            self.wait_for(lambda: self._sizes.load_state_dict(state["updates"]))

    def end(self, state: str, error: str | None) -> None:
        """Writes what is left, says how the run ended, and joins the thread."""
        self._ending = True
        self._worker.stop(partial(self._finish, state, error))

    def _wait_for_slot(self) -> str | None:
        """Waits until the measured step before is on record, and says why that is not worth it any longer."""
        deadline_s = time.monotonic() + _SLOT_WAIT_S
        while not self._border.broken and not self._slot.acquire(timeout=_LOOK_S):
            if self._stream.overfull or self._stream.disk_busy_s > _SLOT_WAIT_ON_DISK_S:
                return "the disk cannot keep up"
            if time.monotonic() > deadline_s:
                return "the writer is busy"
        return None

    def _on_worker_thread(self, job: Callable[[], None]) -> bool:
        """Runs a job of the worker; after a fault, saves once what can be saved, and the last word."""
        if not self._border.broken:
            return self._border.run(job)
        if not self._salvaged:
            self._salvaged = True
            self._salvage()
        return self._ending and self._border.run_last(job)

    def _salvage(self) -> None:
        # Each by itself: whatever broke, the others may still work. On a full disk the little room that is given
        # back is for run.json to say what happened; the rows are in the tail.
        for attempt in (
            self._stream.make_room,
            self._stream.write_manifest,
            self._stream.save,
            self._stream.write_manifest,
        ):
            self._border.run_last(attempt)

    def _finish(self, state: str, error: str | None) -> None:
        if not self._border.run(self._stream.finish_rows) or self._border.broken:
            self._salvage()
        self._border.run_last(self._stream.finish, state, error)
        self._border.run_last(self._stream.release)
