"""The recorder's background half: turns what the training thread left into rows, findings and files.

Runs on the worker's thread, but for what says otherwise. The training thread writes its steps to `log` and offers
jobs for measured steps; it never waits for a disk.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from diagnostics.control.controller import DEFAULT_ACT, Controller
from diagnostics.detect.finding import Finding
from diagnostics.record.detection import Detection
from diagnostics.record.file_thread import FileThread
from diagnostics.record.measured_step import MeasuredStep
from diagnostics.record.rows import attention_rows, spectra_rows, update_rows
from diagnostics.record.summary import Summary
from diagnostics.store.format import HEARTBEAT_PERIOD_S
from diagnostics.store.manifest import Manifest, begin_attempt, current_attempt, write_manifest
from diagnostics.store.parts.merging import Merger
from diagnostics.store.plain import to_json
from diagnostics.store.tail.decode import Row
from diagnostics.store.tail.frames import SEGMENT_BYTES
from diagnostics.store.tail.reserve import Reserve
from diagnostics.store.tail.step_log import StepLog
from diagnostics.store.write import Flush, PartWriter

MERGING = "the merging of part files"
_DISK_WAIT_S = 30.0
# Times the rows of a flush.
_MOST_HELD = 10


@dataclass(frozen=True)
class Cadence:
    """How often things are done.

    Attributes:
        flush_after_s: seconds between two flushes of a young run.
        flush_at_most_s: seconds between two flushes of a long one.
        flush_rows: rows that are flushed whatever the time.
        idle_s: seconds between two looks at what has come.
        segment_bytes: size of a step segment.
    """

    flush_after_s: float = 2.0
    flush_at_most_s: float = 30.0
    flush_rows: int = 20_000
    idle_s: float = 0.2
    segment_bytes: int = SEGMENT_BYTES


CADENCE = Cadence()


class Stream:
    """Owns the run directory's files, the live detectors and the manifest.

    Args:
        run_dir: the run directory, made and claimed.
        manifest: what run.json holds; kept up to date here.
        every: steps between two measured ones.
        attempt: which attempt at the run this is, counted from 1.
        rank: rank of the process in a distributed job; run.json is rank 0's alone.
        number: number of the first flush.
        detectors: whether to run the detectors live.
        on_commands: called when commands wait for the next step boundary.
        contained: runs a job of another thread so that its faults go to the recorder's border.
        contained_for: runs code of a named culprit; False where it failed.
        fetched: gives the scalars that lay on devices, of the steps up to one, by step and name.
        cadence: how often things are done.
    """

    def __init__(
        self,
        run_dir: Path,
        manifest: Manifest,
        *,
        every: int,
        attempt: int = 1,
        rank: int = 0,
        number: int = 0,
        detectors: bool,
        on_commands: Callable[[], None],
        contained: Callable[[Callable[[], None]], bool],
        contained_for: Callable[..., bool],
        fetched: Callable[[int], Mapping[int, Mapping[str, float]]],
        cadence: Cadence | None = None,
    ) -> None:
        self._run_dir = run_dir
        self._manifest = manifest
        self._manifest_lock = threading.Lock()
        self._every, self._attempt, self._rank = every, attempt, rank
        self._detection = Detection(on=detectors)
        self._on_commands = on_commands
        self._contained_for = contained_for
        self._fetched = fetched
        self.cadence = cadence or CADENCE
        # Of the training thread: `step` appends to it.
        self.log, self._writer = self._files(number)
        self._reserve = Reserve(run_dir, rank)
        self._disk = FileThread(contained)
        self._merger = Merger(run_dir, self._contained_merge, rank=rank)
        self.controller: Controller | None = None
        self._taken: list[Row] = []
        self._events: deque[Row] = deque()
        self._summary = Summary.of(manifest)
        self._started_s = time.time()
        self._flushed_s = self._started_s
        self._beaten_s = 0.0
        self._at_disk_s: float | None = None
        self._released = False
        self.step = -1

    def start(self) -> None:
        """Starts the thread that waits for the disk."""
        self._disk.start()

    @property
    def disk_busy_s(self) -> float:
        """Seconds that the disk has been taking over what it does now; callable from any thread."""
        since_s = self._at_disk_s
        return 0.0 if since_s is None else time.monotonic() - since_s

    def announce(self, kind: str, severity: str, message: str, data: Mapping[str, Any], **where: Any) -> None:  # noqa: ANN401 - column values
        """Queues an events row; callable from any thread."""
        self._events.append(
            {
                "step": int(where.get("step", data.get("step", max(self.step, 0)))),
                "time_s": time.time(),
                "kind": kind,
                "severity": severity,
                "layer": where.get("layer"),
                "head": where.get("head"),
                "message": message,
                "data": to_json(data),
            }
        )

    def close_measured(
        self, step: int, measured: MeasuredStep, sites: list[dict[str, object]]
    ) -> dict[str, list[Row]]:
        """Puts the rows of a measured step on record, after all steps before it; returns them by table."""
        self._manifest["sites"] = sites
        self.absorb(up_to=step)
        rows = {
            "attention": attention_rows(step, measured),
            "spectra": spectra_rows(step, measured),
            "updates": update_rows(step, measured),
        }
        with self._at_disk():
            for table, table_rows in rows.items():
                self._writer.add(table, table_rows)
        self._summary.see_measured(step, rows["attention"], rows["spectra"])
        return rows

    def watch(self, step: int, rows: Mapping[str, Sequence[Row]]) -> None:
        """Shows the detectors a measured step; should they fail, the run is recorded without them."""
        if self._detection.on and not self._contained_for("the detectors", self._judge, step, rows):
            self._detection.switch_off()

    def idle(self) -> None:
        """What is done every fraction of a second: rows, commands, files, heartbeat."""
        if not self.overfull:
            self.absorb()
        if self.controller is not None:
            self.controller.poll()
            if self.controller.waiting:
                self._on_commands()
        self._take_events()
        with self._at_disk():
            self._reserve.take()
            self.log.prepare()
        now_s = time.time()
        # Files of a long run grow longer; what waits for them is in the tail, where readers see it.
        cadence = self.cadence
        due_s = min(cadence.flush_at_most_s, max(cadence.flush_after_s, (now_s - self._started_s) / 60.0))
        many = self._writer.pending > cadence.flush_rows
        if self._writer.pending and (now_s - self._flushed_s > due_s or many) and not self._disk.busy:
            self._begin_flush()
        if now_s - self._beaten_s > HEARTBEAT_PERIOD_S and not self._disk.busy:
            self._beaten_s = now_s
            self._disk.submit(self.write_manifest)

    @property
    def overfull(self) -> bool:
        """Whether so much waits for the disk that no more is held in memory: the tail alone takes the steps."""
        return self._disk.busy and self._writer.pending > _MOST_HELD * self.cadence.flush_rows

    def finish_rows(self) -> None:
        """Writes everything to part files, the losses after the last measured step to the detectors before."""
        self.absorb()
        watched = self._detection.on and self._detection.waiting
        if watched and not self._contained_for("the detectors", self._judge_last):
            self._detection.switch_off()
        self.flush()

    def finish(self, state: str, error: str | None) -> None:
        """The last word: how the run ended."""
        self._disk.wait(_DISK_WAIT_S)
        self._manifest |= {"state": state, "error": error, "ended_s": time.time()}
        self.write_manifest()

    def release(self) -> None:
        """Lets all files go, after everything else."""
        self._released = True
        self._disk.wait(_DISK_WAIT_S)
        self._disk.stop()
        self._merger.stop()
        self._reserve.give_back()
        self.log.close()
        self._writer.close()

    def record_fault(self, where: str, error: str, trace: str) -> None:
        """Notes a fault for the manifest and the events; callable from any thread."""
        self._manifest["faults"] = [
            *self._manifest["faults"],
            {"where": where, "error": error, "trace": trace},
        ]
        self.announce("fault", "warning", f"{where}: {error}", {"where": where})

    def record_thinned(self, step: int, reason: str) -> None:
        """Notes that the measurements of a step were left out; callable from the training thread."""
        message = f"what was measured in step {step} is lost: {reason}"
        self.announce("warning", "warning", message, {"step": step})
        before = self._manifest.get("thinned") or {"measured_steps": 0}
        self._manifest["thinned"] = {"measured_steps": before["measured_steps"] + 1, "last_step": step}

    def make_room(self) -> None:
        """Gives the disk back what was taken ahead of need."""
        self._reserve.give_back()
        with suppress(OSError):
            self.log.drop_spare()

    def begin_attempt(self, first_step: int) -> int:
        """Ends this attempt and begins the next in the same directory, because steps will be computed again.

        Args:
            first_step: the step that comes next.

        Returns:
            The number of the new attempt.
        """
        self.finish_rows()
        self.log.close()
        self._writer.close()
        self._attempt += 1
        now_s = time.time()
        current_attempt(self._manifest)["ended_s"] = now_s
        begin_attempt(self._manifest, self._attempt, before="finished", started_s=now_s)
        self._manifest["steps"] = first_step
        self.log, self._writer = self._files(self._writer.number)
        self._disk.submit(self.write_manifest)
        return self._attempt

    def state_dict(self) -> dict[str, Any]:
        if not self._released:
            self.absorb()
        return self._detection.state_dict(self.step)

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Puts the detectors where they were when the state was taken; without a state, at the beginning."""
        self._detection.load_state_dict(state)

    def write_manifest(self) -> None:
        """Replaces run.json; callable from any thread."""
        with self._manifest_lock:
            self._beaten_s = time.time()
            self._manifest |= {"heartbeat_s": self._beaten_s, "summary": self._summary.to_dict()}
            if self._rank == 0:
                # A copy, since other threads add to it.
                write_manifest(self._run_dir, dict(self._manifest))

    def update_manifest(self, **changes: Any) -> None:  # noqa: ANN401 - manifest values
        self._manifest |= changes

    def absorb(self, up_to: int | None = None, before: int | None = None) -> None:
        """Takes what the training thread put on record.

        Args:
            up_to: only steps up to this one; None: all.
            before: only what lies in generations of the tail of smaller numbers; None: in all.
        """
        # Rows stay in `_taken` until the writer has them: lost between the two, a later part would void the tail's.
        self._taken += self.log.read_new(before)
        if not self._taken:
            return
        count = len(self._taken)
        if up_to is not None:
            count = sum(row["step"] <= up_to for row in self._taken)
            if not count:
                return
        rows = self._taken[:count]
        completed = self._complete(rows)
        del self._taken[:count]
        with self._at_disk():
            self._writer.add_logged_steps(rows, completed)
        self._detection.see_steps(rows)
        attempt = current_attempt(self._manifest)
        if attempt.get("first_step") is None:
            attempt["first_step"] = rows[0]["step"]
            if not rows[0]["step"]:
                self._summary = Summary()  # nothing of the attempts before is left to see
        self._summary.see_steps(rows)
        self.step = rows[-1]["step"]
        self._manifest |= {"steps": self.step + 1, "last_step_s": rows[-1]["time_s"]}

    def flush(self) -> None:
        """Writes every row to part files and waits for it."""
        self._disk.wait(_DISK_WAIT_S)
        self._begin_flush(last=True)
        self._disk.wait(_DISK_WAIT_S)

    def save(self) -> None:
        """As `flush`, on this thread, after a fault: the other one runs nothing any more."""
        if self._disk.wait(_DISK_WAIT_S) and (write := self._flush_job(last=True)) is not None:
            write()

    def _begin_flush(self, *, last: bool = False) -> None:
        write = self._flush_job(last=last)
        if write is not None:
            self._disk.submit(write)

    def _flush_job(self, *, last: bool) -> Callable[[], None] | None:
        """What is left to do of a flush where the disk has to be waited for; None where no row waits."""
        self.absorb()
        self._take_events()
        if not self._writer.pending and not self._writer.unfinished:
            return None
        with self._at_disk():
            if not self.log.rotate(self._writer.number + 1):
                return None
        self.absorb(before=self._writer.number + 1)
        flush = self._writer.begin_flush()
        flush.segments += self.log.retire(self._writer.number)
        self._flushed_s = time.time()
        return partial(self._write_flush, self._writer, flush, last=last)

    def _write_flush(self, writer: PartWriter, flush: Flush, *, last: bool) -> None:
        writer.write(flush, last=last)
        self._merger.poke()

    def _files(self, number: int) -> tuple[StepLog, PartWriter]:
        log = StepLog(
            self._run_dir,
            attempt=self._attempt,
            rank=self._rank,
            number=number,
            segment_bytes=self.cadence.segment_bytes,
        )
        writer = PartWriter(
            self._run_dir,
            attempt=self._attempt,
            rank=self._rank,
            number=number,
            every=self._every,
            contained_for=self._contained_for,
        )
        return log, writer

    def _complete(self, rows: Sequence[Row]) -> list[Row]:
        """Fills in the scalars that lay on devices; returns the rows that had any."""
        fetched = self._fetched(rows[-1]["step"])
        if not fetched:
            return []
        completed = [row for row in rows if row["step"] in fetched]
        for row in completed:
            row.update(fetched[row["step"]])
        return completed

    def _contained_merge(self, job: Callable[[], None]) -> bool:
        def at_leisure() -> None:
            # What a disk refuses here can be done later. If the disk is in trouble, writing will say so, and once.
            with suppress(OSError):
                job()

        return self._contained_for(MERGING, at_leisure)

    def _judge(self, step: int, rows: Mapping[str, Sequence[Row]]) -> None:
        self._detection.see_sites(self._manifest["sites"])
        self._tell(self._detection.close_frame(step, rows))

    def _judge_last(self) -> None:
        self._tell(self._detection.close_last(self.step))

    def _tell(self, alerts: list[Finding]) -> None:
        self._manifest |= {"status": self._detection.status, "forecast": self._detection.forecast}
        self._raise_alerts(alerts)

    def _raise_alerts(self, alerts: list[Finding]) -> None:
        for alert in alerts:
            self.announce(
                "alert", alert.severity, alert.message, alert.to_dict(),
                step=alert.raised_step, layer=alert.layer, head=alert.head,
            )  # fmt: skip
            if self.controller is not None and alert.status == "collapsed":
                self.controller.propose(*DEFAULT_ACT, reason=alert.message)
                if self.controller.waiting:
                    self._on_commands()
        self._take_events()  # whoever watches should not wait for the next flush to be told

    def _take_events(self) -> None:
        with self._at_disk():
            while self._events:
                self._writer.add("events", [self._events.popleft()])

    @contextmanager
    def _at_disk(self) -> Iterator[None]:
        """Around what may have to wait for a disk, so that the training thread knows not to wait for it."""
        before_s = self._at_disk_s
        if before_s is None:
            self._at_disk_s = time.monotonic()
        try:
            yield
        finally:
            self._at_disk_s = before_s
