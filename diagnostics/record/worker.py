"""The recorder's own thread, and the jobs that wait for it."""

import queue
import threading
import time
from collections.abc import Callable


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
        self._jobs: queue.Queue[Callable[[], None]] = queue.Queue(capacity)
        self._last: Callable[[], None] | None = None
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
        self._last = last
        try:
            self._jobs.put(last, timeout=timeout_s)
        except queue.Full:
            return
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    @property
    def gone(self) -> bool:
        """Whether the thread has ended: what was its own may be touched by others."""
        return not self._thread.is_alive()

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
            self._contained(job)
            if job is self._last:
                return  # after the last word nothing is idle any more
