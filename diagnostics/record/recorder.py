"""The Recorder: attaches to a model, measures on schedule, and never breaks, slows or changes training."""

import atexit
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from diagnostics.attach.book import SiteBook
from diagnostics.attach.calls import AttentionCall
from diagnostics.attach.observe import Observer
from diagnostics.attach.site import Sites
from diagnostics.attach.traces import may_hold_attention
from diagnostics.control.controller import Controller
from diagnostics.errors import NoAttentionError
from diagnostics.record.border import Border, Fault
from diagnostics.record.claim import check_arguments, claim_run_dir, torch_optimizers
from diagnostics.record.measured_step import MeasuredStep
from diagnostics.record.schedule import is_measured, next_measured
from diagnostics.record.stream import Handed, Stream
from diagnostics.record.update_sizes import UpdateSizes
from diagnostics.record.update_watch import UpdateWatch
from diagnostics.remedies.spectral_bound import active_bounds
from diagnostics.store.format import TABLES
from diagnostics.store.write import Worker

Optimizer = torch.optim.Optimizer
_OWN_COLUMNS = frozenset(column.name for column in TABLES["steps"]) - {"loss", "lr", "grad_norm"}
_LARGEST_INT = 2**1000
_SLOT_WAIT_S = 1.0


class Recorder:
    """Streams per-head spectra, attention entropy and update ratios of a training run to Parquet.

    Attach it around a training loop and call `step` once per optimizer step, after `optimizer.step()`.
    Observing leaves parameters, losses and random states bit-identical; a fault of the recorder's own is
    reported once and switches it off.

    Args:
        model: any module; on measured steps its attention is observed in training forwards.
        optimizer: a torch optimizer, or a sequence of them; None: no update ratios, no remedies.
        run_dir: where the run is written; None makes `runs/<timestamp>-<id>`.
        every: steps 0, every, 2 every, ... are measured.
        layers: regular expression over module paths; only matching attention sites are measured.
        config: anything worth keeping with the run, as a mapping (learning rate, warmup, ...).
        detectors: whether the detectors run live beside the recorder.
        control: `off`, `observe`, `suggest` or `act`.

    Raises:
        ValueError: an argument that cannot work; the message says which and what is allowed.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        run_dir: str | os.PathLike[str] | None = None,
        *,
        every: int = 10,
        layers: str | None = None,
        config: Mapping[str, Any] | None = None,
        detectors: bool = True,
        control: str = "suggest",
    ) -> None:
        self._closed = False
        self._disabled = os.environ.get("DIAGNOSTICS_DISABLED", "") not in ("", "0")
        if self._disabled:
            return
        pattern = check_arguments(model, every, layers, config, control)
        self._model = model
        self._every = every
        self._optimizers = torch_optimizers(optimizer, model)
        self._book = SiteBook(model, pattern)
        if not len(self._book.sites) and layers is None and not may_hold_attention(model):
            raise NoAttentionError(
                f"{type(model).__name__} holds no attention: no module or code in it speaks of attention, softmax or "
                "q and k projections. Attach to the model that does; if attention hides where names do not show it, "
                "name its module with layers='...'"
            )
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._border = Border(self._switch_off, self._leave_out)
        self._observer = Observer(
            model,
            on_call=self._on_call,
            on_exit=self._on_forward_exit,
            heads_at=self._book.heads_at,
            contained=self._contained,
            contained_for=self._contained_for,
        )
        self._updates = UpdateWatch(self._optimizers, self._names)
        self._update_sizes = UpdateSizes()
        self._slot = threading.Semaphore(1)
        self.run_dir, manifest = claim_run_dir(
            run_dir, model=model, config=config, every=every, control=control, sites=self._book.sites
        )
        self._stream = Stream(
            self.run_dir,
            manifest,
            detectors=detectors,
            on_commands=self._wake,
            contained_for=self._border.run_for,
        )
        self._controller = Controller(
            self.run_dir,
            manifest["run_id"],
            model,
            self._optimizers,
            mode=control,
            sites=lambda: self._book.sites,
            announce=self._stream.announce,
        )
        self._stream.controller = self._controller
        self._stream.write_manifest()
        self._step = 0
        self._measured: MeasuredStep | None = None
        self._seen: set[str] = set()
        self._seen_before_forward: set[str] = set()
        self._checked_for_blindness = False
        self._saw_nothing = False
        self._timing = False
        self._overhead_s = 0.0
        self._overhead_in_step_s = 0.0
        self._started_s = time.perf_counter()
        self._process = os.getpid()
        self._salvaged = False
        self._worker = Worker(contained=self._on_worker_thread, idle=self._stream.idle)
        # A script that ends without close() still gets its rows written and its state right.
        self._at_exit = partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)
        self._due = 0
        self._prepare()

    @property
    def sites(self) -> Sites:
        """The attention sites found; what was left out is in `.skipped`, module path to reason."""
        return Sites() if self._disabled else self._book.sites

    @property
    def controller(self) -> Controller | None:
        """The live end of the control channel; None where the recorder is disabled."""
        return None if self._disabled else self._controller

    @property
    def overhead(self) -> float:
        """Share of wall time spent in the recorder on the training thread so far, 0 to 1."""
        if self._disabled:
            return 0.0
        return min(1.0, self._overhead_s / max(1e-9, time.perf_counter() - self._started_s))

    def step(self, loss: object = None, **scalars: object) -> None:
        """Closes a step; call it once per optimizer step, after `optimizer.step()`.

        Args:
            loss: float or 0-d tensor. A tensor on a device is fetched later, never synchronised here.
            **scalars: more of the same kind; `lr` and `grad_norm` fill the columns of those names.
        """
        if self._disabled or self._closed:
            return
        if self._border.broken:
            # The fault may have come on the writer's thread or within a forward; only here is it safe to let go.
            self._disarm()
            return
        start_s = time.perf_counter()
        self._border.run(self._close_step, loss, scalars, start_s)

    def close(self) -> None:
        """Takes everything off the model, writes what is left and joins the writer; idempotent."""
        self._close("finished", None)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: step, detector windows, power-iteration vectors, armed remedies."""
        if self._disabled:
            return {}
        done: dict[str, Any] = {}
        # These belong to the worker: they are taken there, after all that was handed over so far.
        self._on_worker(
            lambda: done.update(stream=self._stream.state_dict(), updates=self._update_sizes.state_dict())
        )
        return {
            "step": self._step,
            "control": self._controller.state_dict(),
            **done,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken; call it before the first step."""
        if self._disabled or not state:
            return
        self._step = int(state["step"])
        self._controller.load_state_dict(state["control"])
        if "stream" in state:
            self._on_worker(lambda: self._stream.load_state_dict(state["stream"]))
            self._on_worker(lambda: self._update_sizes.load_state_dict(state["updates"]))
        self._disarm()
        self._prepare()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close("crashed", f"{kind.__name__}: {error}")

    # --- one step -----------------------------------------------------------------------------------

    def _close_step(self, loss: object, scalars: dict[str, object], start_s: float) -> None:
        step = self._step
        due = step >= self._due
        measured = self._measured if due else None
        if measured is not None:
            measured.captured = self._updates.capture()
            if self._updates.grad_norm is not None:
                scalars.setdefault("grad_norm", self._updates.grad_norm)
        lr = scalars.pop("lr", None)
        if lr is None and self._optimizers:
            lr = self._optimizers[0].param_groups[0]["lr"]
        handed = {name: self._handed(name, value) for name, value in scalars.items() if self._is_free(name)}
        overhead_s = self._overhead_in_step_s + time.perf_counter() - start_s
        self._stream.handed.append(
            Handed(
                step, time.time(), overhead_s, measured is not None,
                self._handed("lr", lr), self._handed("loss", loss), handed,
            )
        )  # fmt: skip
        self._step = step + 1
        self._overhead_s += overhead_s
        self._overhead_in_step_s = 0.0
        if due:
            boundary_s = time.perf_counter()
            self._cross_boundary(step, measured)
            # The row of this step is out already, so what the boundary took is told with the next one.
            self._overhead_in_step_s = time.perf_counter() - boundary_s

    def _handed(self, name: str, value: object) -> object:
        """A scalar as it can be kept: numbers as they are, a device tensor as a copy that holds no graph."""
        if value is None or isinstance(value, float):
            return value
        if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
            return value.item() if value.device.type == "cpu" else value.detach().clone()
        if isinstance(value, np.generic | np.ndarray) and value.size == 1 and value.dtype.kind in "biuf":
            return float(value.item())
        if isinstance(value, int) and abs(value) <= _LARGEST_INT:
            return float(value)
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
        self._border.note(
            f"recorder.step: {name} is a {type(value).__name__}{shape}; give a float or a 0-d tensor. It is not recorded"
        )
        return None

    def _is_free(self, name: str) -> bool:
        if name in _OWN_COLUMNS:
            self._border.note(
                f"recorder.step: {name!r} is a column that the recorder fills itself; hand the scalar in under another "
                "name. It is not recorded"
            )
            return False
        return True

    def _cross_boundary(self, step: int, measured: MeasuredStep | None) -> None:
        if measured is not None:
            self._disarm()
            self._report_blindness(measured)
            self._hand_over(step, measured)
        self._controller.apply_waiting(step + 1)
        self._prepare()

    def _prepare(self) -> None:
        """Arms the observer where the coming step is a measured one, and sets the next step that needs a look."""
        step = self._step
        if is_measured(step, self._every):
            self._arm()
            self._due = step
        else:
            self._due = next_measured(step, self._every) - 1
        # A command may have come in between; the worker lowers `_due` after it has queued one.
        if self._controller.waiting:
            self._due = step

    def _wake(self) -> None:
        self._due = 0

    def _arm(self) -> None:
        self._measured = MeasuredStep()
        self._seen = set()
        self._seen_before_forward = set()
        self._observer.wants_products = not self._book.settled
        self._observer.arm(look_again=self._saw_nothing)
        self._updates.arm(self._contained)

    def _disarm(self) -> None:
        self._measured = None
        self._observer.disarm()
        self._updates.disarm()

    def _hand_over(self, step: int, measured: MeasuredStep) -> None:
        sites = [site.to_dict() for site in self._book.sites]
        overhead = self.overhead
        left_out = dict(self._updates.left_out)
        way = self._observer.way
        remedies = [
            {"name": bound.name, "tau": bound.tau}
            for optimizer in self._optimizers
            for bound in active_bounds(optimizer)
        ]
        # The copies of one measured step wait at most; a worker that is behind is given a little time.
        if not self._slot.acquire(timeout=_SLOT_WAIT_S):
            self._tell_lost(step, "the writer is busy")
            return
        if measured.on_device:
            measured.complete(self._update_sizes, self._contained_for)

        def job() -> None:
            try:
                measured.complete(self._update_sizes, self._border.run_for)
            finally:
                self._slot.release()
            self._stream.update_manifest(
                skipped=dict(self._book.skipped),
                overhead=overhead,
                updates_left_out=left_out,
                attention_observed=way,
                remedies=remedies,
            )
            self._stream.close_measured(step, measured, sites)

        if not self._worker.offer(job):
            self._slot.release()
            self._tell_lost(step, "the disk cannot keep up")

    def _tell_lost(self, step: int, reason: str) -> None:
        message = f"what was measured in step {step} is lost: {reason}"
        self._stream.announce("warning", "warning", message, {"step": step})

    def _report_blindness(self, measured: MeasuredStep) -> None:
        self._saw_nothing = not measured.saw_attention
        if measured.saw_attention:
            self._book.end_step()
        if measured.saw_attention or self._border.faults or self._checked_for_blindness:
            self._checked_for_blindness = True
            return
        self._checked_for_blindness = True
        message = (
            "no attention call was observed in the first measured step: entropy and spectra are not recorded. Either no "
            "training forward of the attached model ran (attach to the module you call), or it ran without gradients "
            "(activation checkpointing with use_reentrant=True does so; use_reentrant=False is observed), or its "
            "attention is of a kind that this version cannot see"
        )
        self._border.note(message)
        self._stream.announce("warning", "warning", message, {"step": self._step - 1})

    # --- inside a measured forward ------------------------------------------------------------------

    def _contained(self, function: Callable[..., None], *args: Any) -> bool:  # noqa: ANN401 - whatever it takes
        with self._timed():
            return self._border.run(function, *args)

    def _contained_for(self, path: str, function: Callable[..., None], *args: Any) -> bool:  # noqa: ANN401 - as above
        with self._timed():
            return self._border.run_for(path, function, *args)

    @contextmanager
    def _timed(self) -> Iterator[None]:
        """Counts as overhead; once, where one such block lies in another."""
        if self._timing:
            yield
            return
        self._timing = True
        start_s = time.perf_counter()
        try:
            yield
        finally:
            self._timing = False
            self._overhead_in_step_s += time.perf_counter() - start_s

    def _on_call(self, call: AttentionCall, path: tuple[str, ...], observer: Observer) -> None:
        measured = self._measured
        if measured is None:
            return
        site = self._book.site_of(call, path, observer)
        # A second micro-batch would only repeat what the first has shown; a shared layer's calls within one
        # forward all count.
        if site is None or site.name in self._seen_before_forward:
            return
        if call.q_bhtk.shape[1] != site.heads:
            self._border.note(
                f"{site.name or 'the model'} calls attention with {site.heads} and with {call.q_bhtk.shape[1]} heads: "
                "a row per head cannot hold both, so only the first kind is observed"
            )
            return
        self._seen.add(site.name)
        measured.add_call(site, call)

    def _on_forward_exit(self) -> None:
        measured = self._measured
        if measured is None:
            return
        parameters: dict[str, nn.Parameter] | None = None
        for site in self._book.sites:
            if site.name in self._seen:
                parameters = parameters or dict(self._model.named_parameters(remove_duplicate=False))
                self._contained_for(site.name, measured.add_weights, site, parameters)
        self._seen_before_forward = set(self._seen)

    # --- end ----------------------------------------------------------------------------------------

    def _switch_off(self, fault: Fault) -> None:
        """After a fault of our own nothing more is done; what was recorded stays. `step` takes the hooks off."""
        self._measured = None
        self._stream.record_fault(fault.where, fault.error, fault.trace)

    def _leave_out(self, path: str, fault: Fault) -> None:
        """After a fault at one attention site, or in the detectors: it is marked and left out, the rest goes on."""
        self._book.skip(path, fault.error)
        self._stream.record_fault(fault.where, fault.error, fault.trace)

    def _on_worker_thread(self, job: Callable[[], None]) -> bool:
        """Runs a job of the worker; after a fault, saves once what can be saved, and the last word."""
        if not self._border.broken:
            return self._border.run(job)
        if not self._salvaged:
            self._salvaged = True
            self._salvage()
        return self._closed and self._border.run_last(job)

    def _salvage(self) -> None:
        # Each by itself: whatever broke, the others may still work.
        for attempt in (self._stream.absorb, self._stream.flush, self._stream.write_manifest):
            self._border.run_last(attempt)

    def _finish(self, state: str, error: str | None) -> None:
        if not self._border.run(self._stream.finish_rows):
            self._salvage()
        self._border.run_last(self._stream.finish, state, error)

    def _on_worker(self, job: Callable[[], None]) -> None:
        """Has a job run on the worker's thread and waits for it."""
        done = threading.Event()

        def run() -> None:
            try:
                job()
            finally:
                done.set()

        if self._worker.offer(run):
            done.wait(60.0)

    def _close(self, state: str, error: str | None) -> None:
        if self._disabled or self._closed or os.getpid() != self._process:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self._observer.disarm()
        self._updates.disarm()
        self._stream.update_manifest(overhead=self.overhead)
        self._worker.stop(partial(self._finish, state, error))
        self._controller.close()


def _close_at_exit(reference: "weakref.ref[Recorder]") -> None:
    recorder = reference()
    if recorder is not None:
        error = getattr(sys, "last_value", None)
        if error is None:
            recorder.close()
        else:
            recorder._close("crashed", f"{type(error).__name__}: {error}")  # noqa: SLF001 - its own module
