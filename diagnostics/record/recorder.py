"""The Recorder: attaches to a model, measures on schedule, and never breaks, slows or changes training."""

import atexit
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from diagnostics.attach.site import Sites
from diagnostics.border import Border, Fault
from diagnostics.control.controller import Controller
from diagnostics.record.arguments import check_arguments, check_holds_attention, torch_optimizers
from diagnostics.record.background import Background
from diagnostics.record.claim import claim_run_dir
from diagnostics.record.forward_watch import ForwardWatch
from diagnostics.record.measured_step import MeasuredStep
from diagnostics.record.notice import tell
from diagnostics.record.overhead import Overhead
from diagnostics.record.ranks import this_rank
from diagnostics.record.scalars import Scalars
from diagnostics.record.schedule import is_measured, next_measured
from diagnostics.record.site_report import SiteReport
from diagnostics.record.stream import Stream
from diagnostics.record.update_watch import UpdateWatch
from diagnostics.record.uploading import Uploading
from diagnostics.remedies.spectral_bound import SpectralBound, active_bounds

Optimizer = torch.optim.Optimizer


class Recorder:
    """Streams per-head spectra, attention entropy and update ratios of a training run to Parquet.

    Attach it around a training loop and call `step` once per optimizer step, after `optimizer.step()`.
    Observing leaves parameters, losses and random states bit-identical; a fault of the recorder's own is
    reported once and switches it off. Which attention was found is logged, at INFO, by the logger `diagnostics`;
    what was found but is not observed, at WARNING.

    `DIAGNOSTICS_DISABLED=1` in the environment makes it a no-op. `DIAGNOSTICS_ACTIVATIONS=0` turns the activation
    side off alone: forwards are watched in the first measured step only, to verify how each site's weights lie;
    spectra and updates are recorded, entropy and logits are not, and run.json says so. In a distributed job rank 0
    records and the recorders of the others are no-ops; `DIAGNOSTICS_RANKS=all`, or ranks such as `0,3`, makes those
    write too.

    Args:
        model: any module; on measured steps its attention is observed in training forwards.
        optimizer: a torch optimizer, or several of them; None: no update ratios, no remedies.
        run_dir: where the run is written; None makes `runs/<timestamp>-<id>`. A run that is there already and that
            nobody records is carried on, as another attempt: steps recorded again replace the old ones for readers, and
            both stay on disk. A URI (`s3://bucket/path`) is recorded
            into a folder of this machine, below DIAGNOSTICS_SPOOL, and uploaded from there beside the training.
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
        # Of a recorder that records nothing, as that of a rank that was not asked, it is what was given.
        self.run_dir: Path | str = "" if run_dir is None else str(run_dir)
        self._disabled = os.environ.get("DIAGNOSTICS_DISABLED", "") not in ("", "0")
        if self._disabled:
            return
        rank = this_rank()
        self._disabled = not rank.records
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
        claim = self._claim = claim_run_dir(
            run_dir, model=model, config=config, every=every, control=control, sites=self.sites, rank=rank
        )
        manifest = claim.manifest
        with claim.kept_if_it_works() as undo:
            self._scalars = Scalars(self._border.note)
            self._stream = Stream(
                claim.run_dir,
                manifest,
                every=every,
                attempt=claim.attempt,
                rank=claim.rank,
                number=claim.number,
                detectors=detectors,
                on_commands=self._wake,
                contained=self._border.run,
                contained_for=self._border.run_for,
                fetched=self._scalars.fetched,
            )
            self._controller = Controller(
                claim.run_dir,
                manifest["run_id"],
                model,
                self._optimizers,
                # The inbox belongs to rank 0.
                mode="off" if rank.number else control,
                sites=lambda: self._forwards.sites,
                announce=self._stream.announce,
                ranks=rank.count,
            )
            self._stream.controller = self._controller
            self._stream.write_manifest()
            self._report = SiteReport(type(model).__name__, self._border.note, self._stream.announce)
            self._report.show(self.sites)
            for sentence in claim.told:
                tell(sentence)
            for sentence in claim.warned:
                self._border.note(sentence)
                self._stream.announce("warning", "warning", sentence, {})
            self._step = self._loaded_step = 0
            self._has_steps = False
            self._due = 0
            self._measured: MeasuredStep | None = None
            self._met_armed: weakref.WeakKeyDictionary[SpectralBound, int] = weakref.WeakKeyDictionary()
            self._process = os.getpid()
            self._background = Background(self._stream, self._border)
            undo.callback(self._background.end, "crashed", "the recorder could not be made")
            # A script that ends without close() still gets its rows written and its state right.
            self._at_exit = partial(_close_at_exit, weakref.ref(self))
            atexit.register(self._at_exit)
            undo.callback(atexit.unregister, self._at_exit)
            undo.callback(self._disarm)
            _RECORDING.add(self)
            self._prepare()
            self._uploading = Uploading(claim, self._stream, self._border.note)
            self.run_dir = self._uploading.run_dir

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
            **scalars: more of the same kind; `lr`, `grad_norm` and `adam_rms` fill the columns of those names.
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
        """Continues where `state_dict` was taken; `{"step": N}` alone is enough to go on at step N.

        Call it before the first step. Later, going back to a step that was recorded already begins a new attempt:
        steps recorded again replace the old ones for readers.
        """
        if self._disabled or self._closed or not state or os.getpid() != self._process:
            return
        step = int(state["step"])
        self._has_steps |= self._step > self._loaded_step
        if self._has_steps and step < self._step:
            self._border.run(self._begin_attempt, step)
            self._has_steps = False
        self._step = self._loaded_step = step
        if "control" in state:
            self._controller.load_state_dict(state["control"])
        self._background.load_state_dict(state)
        self._disarm()
        self._prepare()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self.close()
        else:
            self._close("crashed", f"{type(error).__name__}: {error}")

    # --- one step -----------------------------------------------------------------------------------

    def _close_step(self, loss: object, scalars: dict[str, object], start_s: float) -> None:
        step = self._step
        due = step >= self._due
        measured = self._measured if due else None
        if measured is not None:
            measured.captured = self._updates.capture()
            if self._updates.grad_norm is not None:
                scalars.setdefault("grad_norm", self._updates.grad_norm)
            if self._updates.adam_rms is not None:
                scalars.setdefault("adam_rms", self._updates.adam_rms)
        lr = scalars.pop("lr", None)
        if lr is None and self._optimizers:
            lr = self._optimizers[0].param_groups[0]["lr"]
        kept = self._scalars.kept
        names: tuple[str, ...] = ()
        values: list[float] = []
        if scalars:
            allowed = self._scalars.allowed(scalars)
            names = tuple(allowed)
            # A float is kept as it is; the call that would find that out costs more than all else here.
            values = [
                value if type(value) is float else kept(step, name, value) for name, value in allowed.items()
            ]
        loss = loss if type(loss) is float else kept(step, "loss", loss)
        lr = lr if type(lr) is float else kept(step, "lr", lr)
        overhead_s = self._overhead.close_step(start_s)
        closed_s = time.perf_counter()
        self._stream.log.append(step, time.time(), overhead_s, measured is not None, loss, lr, names, values)
        self._step = step + 1
        if due:
            self._cross_boundary(step, measured)
        # The record of this step is out already, so what came after is told with the next one.
        self._overhead.in_step_s = time.perf_counter() - closed_s

    def _cross_boundary(self, step: int, measured: MeasuredStep | None) -> None:
        if measured is not None:
            self._disarm()
            self._hand_over(step, measured)
        self._controller.apply_waiting(step + 1)
        self._prepare()

    def _begin_attempt(self, step: int) -> None:
        """Goes on with `step` in a new attempt: what was recorded from there on stays on disk, under the old one."""
        self._disarm()
        attempt: list[int] = []
        self._background.wait_for(lambda: attempt.append(self._stream.begin_attempt(step)))
        if attempt:
            self._claim.lock.note(attempt=attempt[0])

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
                {"name": bound.name, "tau": bound.tau, "step": self._met_armed.setdefault(bound, step)}
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
        self._border.run_last(self._uploading.finish)
        self._claim.release()


# A forked child has the parent's recorder, whose files and thread are the parent's alone.
_RECORDING: "weakref.WeakSet[Recorder]" = weakref.WeakSet()


def _let_go_in_child() -> None:
    for recorder in _RECORDING:
        recorder._closed = True  # noqa: SLF001 - its own module


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


def _close_at_exit(reference: "weakref.ref[Recorder]") -> None:
    recorder = reference()
    if recorder is not None:
        error = getattr(sys, "last_value", None)
        if error is None:
            recorder.close()
        else:
            recorder._close("crashed", f"{type(error).__name__}: {error}")  # noqa: SLF001 - its own module
