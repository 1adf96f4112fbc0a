"""The thread that waits for the disk, so that neither training nor the measuring of its steps has to."""

import queue
import threading
from collections.abc import Callable

Job = Callable[[], None]


class FileThread:
    """Runs jobs in the order they were handed over.

    Args:
        contained: runs a job so that its faults go to the recorder's border.
    """

    def __init__(self, contained: Callable[[Job], bool]) -> None:
        self._contained = contained
        self._jobs: queue.Queue[Job | None] = queue.Queue()
        # Daemon: a training process that ends without close() must be able to exit.
        self._thread = threading.Thread(target=self._run, name="diagnostics-files", daemon=True)

    def start(self) -> None:
        """Starts the thread; not before: an interpreter that ends can start none for the jobs of its last moment."""
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a job runs or waits."""
        return self._jobs.unfinished_tasks > 0

    def submit(self, job: Job) -> None:
        self._jobs.put(job)

    def wait(self, timeout_s: float) -> bool:
        """Waits until all jobs are done; False where that took too long."""
        with self._jobs.all_tasks_done:
            return self._jobs.all_tasks_done.wait_for(lambda: not self.busy, timeout_s)

    def stop(self) -> None:
        """Ends the thread after its jobs; does not wait."""
        self._jobs.put(None)

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                if job is None:
                    return
                self._contained(job)
            finally:
                self._jobs.task_done()
