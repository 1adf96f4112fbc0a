"""The Recorder: attaches to a model, measures on schedule, and never breaks, slows or changes training."""

import atexit
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from diagnostics.attach.site import Sites
from diagnostics.border import Border, Fault
from diagnostics.control.controller import Controller
from diagnostics.record.background import Background
from diagnostics.record.claim import (
    check_arguments,
    check_holds_attention,
    claim_run_dir,
    torch_optimizers,
)
from diagnostics.record.forward_watch import ForwardWatch
from diagnostics.record.measured_step import MeasuredStep
from diagnostics.record.overhead import Overhead
from diagnostics.record.scalars import kept_scalar, kept_scalars
from diagnostics.record.schedule import is_measured, next_measured
from diagnostics.record.site_report import SiteReport
from diagnostics.record.stream import Handed, Stream
from diagnostics.record.update_watch import UpdateWatch
from diagnostics.remedies.spectral_bound import active_bounds

Optimizer = torch.optim.Optimizer


class Recorder:
    """Streams per-head spectra, attention entropy and update ratios of a training run to Parquet.

    Attach it around a training loop and call `step` once per optimizer step, after `optimizer.step()`.
    Observing leaves parameters, losses and random states bit-identical; a fault of the recorder's own is
    reported once and switches it off. Which attention was found is logged, at INFO, by the logger `diagnostics`;
    what was found but is not observed, at WARNING.

    `DIAGNOSTICS_DISABLED=1` in the environment makes it a no-op. `DIAGNOSTICS_ACTIVATIONS=0` turns the activation
    side off alone: forwards are watched in the first measured step only, to verify how each site's weights lie;
    spectra and updates are recorded, entropy and logits are not, and run.json says so.

    Args:
        model: any module; on measured steps its attention is observed in training forwards.
        optimizer: a torch optimizer, or several of them; None: no update ratios, no remedies.
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
        self._every = every
        self._optimizers = torch_optimizers(optimizer, model)
        self._border = Border(self._switch_off, self._leave_out)
        self._overhead = Overhead()
        self._forwards = ForwardWatch(
            model,
            pattern,
            border=self._border,
            overhead=self._overhead,
            activations=os.environ.get("DIAGNOSTICS_ACTIVATIONS", "") != "0",
        )
        check_holds_attention(model, self.sites, layers)
        self._updates = UpdateWatch(self._optimizers, model)
        self.run_dir, manifest = claim_run_dir(
            run_dir, model=model, config=config, every=every, control=control, sites=self.sites
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
            sites=lambda: self._forwards.sites,
            announce=self._stream.announce,
        )
        self._stream.controller = self._controller
        self._stream.write_manifest()
        self._report = SiteReport(type(model).__name__, self._border.note, self._stream.announce)
        self._report.show(self.sites)
        self._step = 0
        self._due = 0
        self._measured: MeasuredStep | None = None
        self._process = os.getpid()
        self._background = Background(self._stream, self._border)
        # A script that ends without close() still gets its rows written and its state right.
        self._at_exit = partial(_close_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)
        self._prepare()

    @property
    def sites(self) -> Sites:
        """The attention sites found; what was left out is in `.skipped`, module path to reason."""
        return Sites() if self._disabled else self._forwards.sites

    @property
    def controller(self) -> Controller | None:
        """The live end of the control channel; None where the recorder is disabled."""
        return None if self._disabled else self._controller

    @property
    def overhead(self) -> float:
        """Share of wall time spent in the recorder on the training thread so far, 0 to 1."""
        return 0.0 if self._disabled else self._overhead.share

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
        return {
            "step": self._step,
            "control": self._controller.state_dict(),
            **self._background.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken; call it before the first step."""
        if self._disabled or not state:
            return
        self._step = int(state["step"])
        self._controller.load_state_dict(state["control"])
        if "stream" in state:
            self._background.load_state_dict({"stream": state["stream"], "updates": state["updates"]})
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
        note = self._border.note
        loss, lr = kept_scalar("loss", loss, note), kept_scalar("lr", lr, note)
        kept = kept_scalars(scalars, note) if scalars else scalars
        overhead_s = self._overhead.close_step(start_s)
        self._stream.handed.append(
            Handed(step, time.time(), overhead_s, measured is not None, lr, loss, kept)
        )
        self._step = step + 1
        if due:
            boundary_s = time.perf_counter()
            self._cross_boundary(step, measured)
            # The row of this step is out already, so what the boundary took is told with the next one.
            self._overhead.in_step_s = time.perf_counter() - boundary_s

    def _cross_boundary(self, step: int, measured: MeasuredStep | None) -> None:
        if measured is not None:
            self._disarm()
            self._hand_over(step, measured)
        self._controller.apply_waiting(step + 1)
        self._prepare()

    def _hand_over(self, step: int, measured: MeasuredStep) -> None:
        shown = self._forwards.end_step()
        sites = self.sites
        if shown is not None:
            called, uncalled = shown
            faulty = bool(self._border.faults)
            self._report.after_measured(step, sites, called=called, uncalled=uncalled, faulty=faulty)
        facts = {
            "skipped": dict(sites.skipped),
            "overhead": self.overhead,
            "updates_left_out": dict(self._updates.left_out),
            "attention_observed": self._forwards.way,
            "remedies": [
                {"name": bound.name, "tau": bound.tau}
                for optimizer in self._optimizers
                for bound in active_bounds(optimizer)
            ],
        }
        described = [site.to_dict() for site in sites]
        self._background.take(step, measured, described, facts, self._forwards.contained_for)

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
        self._forwards.arm(self._measured)
        self._updates.arm(self._forwards.contained)

    def _disarm(self) -> None:
        self._measured = None
        self._forwards.disarm()
        self._updates.disarm()

    # --- end ----------------------------------------------------------------------------------------

    def _switch_off(self, fault: Fault) -> None:
        """After a fault of our own nothing more is done; what was recorded stays. `step` takes the hooks off."""
        self._measured = None
        self._forwards.forget()
        self._stream.record_fault(fault.where, fault.error, fault.trace)

    def _leave_out(self, path: str, fault: Fault) -> None:
        """After a fault at one attention site, or in the detectors: it is marked and left out, the rest goes on."""
        self._forwards.leave_out(path, fault.error)
        self._stream.record_fault(fault.where, fault.error, fault.trace)

    def _on_worker(self, job: Callable[[], None]) -> None:
        """Has a job run on the writer's thread and waits for it."""
        self._background.wait_for(job)

    def _close(self, state: str, error: str | None) -> None:
        if self._disabled or self._closed or os.getpid() != self._process:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self._forwards.disarm()
        self._updates.disarm()
        self._stream.update_manifest(overhead=self.overhead)
        self._background.end(state, error)
        self._controller.close()


def _close_at_exit(reference: "weakref.ref[Recorder]") -> None:
    recorder = reference()
    if recorder is not None:
        error = getattr(sys, "last_value", None)
        if error is None:
            recorder.close()
        else:
            recorder._close("crashed", f"{type(error).__name__}: {error}")  # noqa: SLF001 - its own module
