"""The recorder's background half: turns what was handed over into rows, findings and files.

Runs on the worker's thread. The training thread appends to `handed` and offers jobs; it never waits.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diagnostics.control.controller import DEFAULT_ACT, Controller
from diagnostics.detect.finding import Finding
from diagnostics.detect.monitor import Monitor
from diagnostics.detect.replay import FrameBuilder
from diagnostics.record.measured_step import MeasuredStep
from diagnostics.record.rows import attention_rows, spectra_rows, update_rows
from diagnostics.store.format import HEARTBEAT_PERIOD_S
from diagnostics.store.manifest import Manifest, write_manifest
from diagnostics.store.plain import to_json
from diagnostics.store.write import PartWriter, Row

_FLUSH_AFTER_S = 2.0
_FLUSH_AT_MOST_S = 30.0
_FLUSH_ROWS = 20_000


class Handed(NamedTuple):
    """What the training thread hands over for one step; scalars may still be tensors on a device."""

    step: int
    time_s: float
    overhead_s: float
    measured: bool
    lr: object
    loss: object
    scalars: Mapping[str, object]


class Stream:
    """Owns the run directory's files, the live detectors and the manifest.

    Args:
        run_dir: the run directory, made and claimed.
        manifest: what run.json holds; kept up to date here.
        detectors: whether to run the detectors live.
        controller: polled for commands, told of alerts; None without a control channel.
        on_commands: called when commands wait for the next step boundary.
        contained_for: runs code of a named culprit; False where it failed.
    """

    def __init__(
        self,
        run_dir: Path,
        manifest: Manifest,
        *,
        detectors: bool,
        on_commands: Callable[[], None],
        contained_for: Callable[..., bool],
    ) -> None:
        self._run_dir = run_dir
        self._manifest = manifest
        self._writer = PartWriter(run_dir)
        self._monitor = Monitor() if detectors else None
        self._frames = FrameBuilder()
        self._on_commands = on_commands
        self._contained_for = contained_for
        self.controller: Controller | None = None
        self.handed: deque[Handed] = deque()
        self._events: deque[Row] = deque()
        self._started_s = time.time()
        self._flushed_s = self._started_s
        self._beaten_s = 0.0
        self.step = -1

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

    def close_measured(self, step: int, measured: MeasuredStep, sites: list[dict[str, object]]) -> None:
        """Rows and findings of a measured step, after all steps before it."""
        self._manifest["sites"] = sites
        self.absorb(up_to=step)
        attention, spectra, updates = (
            attention_rows(step, measured),
            spectra_rows(step, measured),
            update_rows(step, measured),
        )
        self._writer.add("attention", attention)
        self._writer.add("spectra", spectra)
        self._writer.add("updates", updates)
        self._watch(step, attention, spectra, updates)

    def idle(self) -> None:
        """What is done every fraction of a second: rows, commands, files, heartbeat."""
        self.absorb()
        if self.controller is not None:
            self.controller.poll()
            if self.controller.waiting:
                self._on_commands()
        self._take_events()
        now_s = time.time()
        # Files of a long run grow longer: whoever watches an hour-old run can wait half a minute.
        due_s = min(_FLUSH_AT_MOST_S, max(_FLUSH_AFTER_S, (now_s - self._started_s) / 60.0))
        if self._writer.pending and (now_s - self._flushed_s > due_s or self._writer.pending > _FLUSH_ROWS):
            self.flush()
        if now_s - self._beaten_s > HEARTBEAT_PERIOD_S:
            self.write_manifest()

    def finish_rows(self) -> None:
        """Flushes everything."""
        self.absorb()
        if self._frames.open:
            self._watch(self.step)
        self._take_events()
        self.flush()

    def finish(self, state: str, error: str | None) -> None:
        """The last word: how the run ended."""
        self._manifest |= {"state": state, "error": error, "ended_s": time.time()}
        self.write_manifest()

    def record_fault(self, where: str, error: str, trace: str) -> None:
        """Notes a fault for the manifest and the events; callable from any thread."""
        self._manifest["faults"] = [
            *self._manifest["faults"],
            {"where": where, "error": error, "trace": trace},
        ]
        self.announce("fault", "warning", f"{where}: {error}", {"where": where})

    def state_dict(self) -> dict[str, Any]:
        return {
            "monitor": None if self._monitor is None else self._monitor.state_dict(),
            "frames": self._frames.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._monitor is not None and state["monitor"] is not None:
            self._monitor.load_state_dict(state["monitor"])
        self._frames.load_state_dict(state["frames"])

    def write_manifest(self) -> None:
        self._beaten_s = time.time()
        self._manifest["heartbeat_s"] = self._beaten_s
        write_manifest(self._run_dir, self._manifest)

    def update_manifest(self, **changes: Any) -> None:  # noqa: ANN401 - manifest values
        self._manifest |= changes

    def absorb(self, up_to: int | None = None) -> None:
        """Makes rows of what was handed over, up to a step."""
        rows: list[Row] = []
        while self.handed and (up_to is None or self.handed[0].step <= up_to):
            handed = self.handed.popleft()
            row: Row = {
                "step": handed.step,
                "time_s": handed.time_s,
                "loss": _number(handed.loss),
                "lr": _number(handed.lr),
                "grad_norm": None,
                "measured": handed.measured,
                "overhead_s": handed.overhead_s,
            }
            row |= {name: _number(value) for name, value in handed.scalars.items()}
            rows.append(row)
            if self._monitor is not None:
                self._frames.add(row["step"], row["loss"])
            self.step = handed.step
            self._manifest |= {"steps": handed.step + 1, "last_step_s": handed.time_s}
        self._writer.add("steps", rows)

    def _watch(self, step: int, *tables: list[Row]) -> None:
        """Shows the detectors what came; should they fail, the run is recorded without them."""
        if self._monitor is not None and not self._contained_for(
            "the detectors", self._feed, self._monitor, step, *tables
        ):
            self._monitor = None

    def _feed(self, monitor: Monitor, step: int, *tables: list[Row]) -> None:
        self._raise_alerts(monitor.feed(self._frames.close(step, *tables)))
        self._manifest["status"] = monitor.status()

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

        if alerts:
            self.flush()  # whoever watches should not wait for the next flush to be told

    def _take_events(self) -> None:
        while self._events:
            self._writer.add("events", [self._events.popleft()])

    def flush(self) -> None:
        """Writes every row to disk."""
        self._take_events()
        self._writer.flush()
        self._flushed_s = time.time()


def _number(value: object) -> float | None:
    if isinstance(value, torch.Tensor):
        return float(value.item())
    return None if value is None else float(value)  # type: ignore[arg-type]
