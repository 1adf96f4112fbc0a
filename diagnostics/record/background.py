"""The recorder's thread: measured steps and rows go there, faults there save what they can, and it ends the run."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from diagnostics.border import Border
from diagnostics.record.measured_step import MeasuredStep
from diagnostics.record.stream import Stream
from diagnostics.record.update_sizes import UpdateSizes
from diagnostics.store.write import Worker

_SLOT_WAIT_S = 1.0
_JOB_WAIT_S = 60.0


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
        self._worker = Worker(contained=self._on_worker_thread, idle=stream.idle)

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
        # The copies of one measured step wait at most; a worker that is behind is given a little time.
        if not self._slot.acquire(timeout=_SLOT_WAIT_S):
            self._tell_lost(step, "the writer is busy")
            return
        if measured.on_device:
            measured.complete(self._sizes, contained_for)

        def job() -> None:
            try:
                measured.complete(self._sizes, self._border.run_for)
            finally:
                self._slot.release()
            self._stream.update_manifest(**facts)
            self._stream.close_measured(step, measured, sites)

        if not self._worker.offer(job):
            self._slot.release()
            self._tell_lost(step, "the disk cannot keep up")

    def wait_for(self, job: Callable[[], None]) -> None:
        """Has a job run on the worker's thread, after all that was handed over so far, and waits for it."""
        done = threading.Event()

        def run() -> None:
            try:
                job()
            finally:
                done.set()

        if self._worker.offer(run):
            done.wait(_JOB_WAIT_S)

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {}
        # These belong to the worker: they are taken there.
        self.wait_for(
            lambda: state.update(stream=self._stream.state_dict(), updates=self._sizes.state_dict())
        )
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.wait_for(lambda: self._stream.load_state_dict(state["stream"]))
        self.wait_for(lambda: self._sizes.load_state_dict(state["updates"]))

    def end(self, state: str, error: str | None) -> None:
        """Writes what is left, says how the run ended, and joins the thread."""
        self._ending = True
        self._worker.stop(partial(self._finish, state, error))

    def _tell_lost(self, step: int, reason: str) -> None:
        message = f"what was measured in step {step} is lost: {reason}"
        self._stream.announce("warning", "warning", message, {"step": step})

    def _on_worker_thread(self, job: Callable[[], None]) -> bool:
        """Runs a job of the worker; after a fault, saves once what can be saved, and the last word."""
        if not self._border.broken:
            return self._border.run(job)
        if not self._salvaged:
            self._salvaged = True
            self._salvage()
        return self._ending and self._border.run_last(job)

    def _salvage(self) -> None:
        # Each by itself: whatever broke, the others may still work.
        for attempt in (self._stream.absorb, self._stream.flush, self._stream.write_manifest):
            self._border.run_last(attempt)

    def _finish(self, state: str, error: str | None) -> None:
        if not self._border.run(self._stream.finish_rows):
            self._salvage()
        self._border.run_last(self._stream.finish, state, error)
