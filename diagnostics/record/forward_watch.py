"""What happens inside a measured forward: which attention calls are kept, of which sites, and which weights."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from diagnostics.attach.book import SiteBook
from diagnostics.attach.calls import AttentionCall
from diagnostics.attach.kernels import KernelRows
from diagnostics.attach.observe import Observer
from diagnostics.attach.site import Sites
from diagnostics.border import Border
from diagnostics.record.measured_step import MeasuredStep
from diagnostics.record.overhead import Overhead


class ForwardWatch:
    """Observes the forwards of measured steps into a `MeasuredStep`.

    Args:
        model: the attached model.
        layers: regular expression over module paths; only matching sites are kept (None: all).
        border: contains every fault met inside a forward.
        overhead: what is done here counts there.
        activations: False: forwards are watched only until the layouts are known, for spectra; no attention is
            recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: re.Pattern[str] | None,
        *,
        border: Border,
        overhead: Overhead,
        activations: bool = True,
    ) -> None:
        self._model = model
        self._layers = layers
        self._border = border
        self._overhead = overhead
        self._activations = activations
        self._modules = dict(model.named_modules())
        self._book = SiteBook(model, layers)
        self._left_out: dict[str, str] = {}
        self._observer = Observer(
            model,
            on_call=self._on_call,
            on_exit=self._on_exit,
            on_kernel=self._on_kernel,
            heads_at=self._heads_at,
            contained=self.contained,
            contained_for=self.contained_for,
        )
        self._measured: MeasuredStep | None = None
        self._seen: set[str] = set()
        self._seen_before: set[str] = set()
        self._layouts_known = False
        self._saw_nothing = False
        self._forward_ended = False
        self._look_for_changes = True
        self._stale = False

    @property
    def sites(self) -> Sites:
        return self._book.sites

    @property
    def way(self) -> str:
        """How attention is observed, for the run's metadata."""
        if self._activations:
            return self._observer.way
        return f"not at all (DIAGNOSTICS_ACTIVATIONS=0); layouts were probed once, {self._observer.way}"

    def arm(self, measured: MeasuredStep) -> None:
        """From now on, forwards are observed into `measured`."""
        self._measured = measured
        self._seen, self._seen_before = set(), set()
        self._forward_ended = False
        self._look_for_changes, self._stale = True, False
        self._follow_changes()
        if self._layouts_known and not self._activations:
            # Between two steps: these are the weights that the coming forward uses.
            self._seen = {site.name for site in self._book.sites}
            self._on_exit()
            return
        self._observer.wants_products = not self._book.settled
        self._observer.arm(look_again=self._saw_nothing)

    def disarm(self) -> None:
        self._measured = None
        self._observer.disarm()

    def forget(self) -> None:
        """Keeps nothing more, but leaves the hooks where they are: safe in the middle of a forward."""
        self._measured = None

    def end_step(self) -> tuple[bool, list[str]] | None:
        """Closes a measured step: whether attention was called in it, and the candidates found not to be called.

        None where the model was changed after the step was armed: its forward was not observed.
        """
        if self._stale:
            return None
        called = bool(self._seen)
        self._saw_nothing = not called
        before = set(self._book.skipped)
        if called and not self._layouts_known:
            self._book.end_step()
            self._layouts_known = not self._activations and self._book.settled
        elif self._forward_ended and not called:
            # A forward was seen from end to end without attention: what names suggested is none (a state-space
            # model's mixer, say). A site that is called later after all comes back.
            self._book.skip_uncalled()
        return called, [name for name in self._book.skipped if name not in before]

    def leave_out(self, path: str, reason: str) -> None:
        """Marks the site at or around a module path; it is not observed any more."""
        self._left_out[path] = reason
        self._book.skip(path, reason)

    def contained(self, function: Callable[..., None], *args: Any) -> bool:  # noqa: ANN401 - whatever it takes
        """Runs our code, its faults contained and its time counted."""
        with self._overhead.timed():
            return self._border.run(function, *args)

    def contained_for(self, path: str, function: Callable[..., None], *args: Any) -> bool:  # noqa: ANN401 - as above
        """As `contained`; a fault takes only the site at that path out."""
        with self._overhead.timed():
            return self._border.run_for(path, function, *args)

    def _follow_changes(self) -> None:
        """Starts a new book where modules were added, replaced or taken away: a layout is that of one module."""
        if not self._changed():
            return
        self._modules = dict(self._model.named_modules())
        self._book = SiteBook(self._model, self._layers)
        self._layouts_known = False
        for path, reason in self._left_out.items():
            self._book.skip(path, reason)

    def _changed(self) -> bool:
        modules = dict(self._model.named_modules())
        return modules.keys() != self._modules.keys() or any(
            module is not self._modules[name] for name, module in modules.items()
        )

    def _is_stale(self) -> bool:
        """Whether modules were changed since the step was armed: what runs now would get other modules' names."""
        if self._look_for_changes:
            self._look_for_changes = False
            self._stale = self._stale or self._changed()
        return self._stale

    def _on_call(self, call: AttentionCall, path: tuple[str, ...], observer: Observer) -> None:
        measured = self._measured
        if measured is None or self._is_stale():
            return
        site = self._book.site_of(call, path, observer)
        # A second micro-batch would only repeat what the first has shown; a shared layer's calls within one
        # forward all count.
        if site is None or site.name in self._seen_before:
            return
        if call.q_bhtk.shape[1] != site.heads:
            self._border.note(
                f"{site.name or 'the model'} calls attention with {site.heads} and with {call.q_bhtk.shape[1]} heads: "
                "a row per head cannot hold both, so only the first kind is observed"
            )
            return
        self._seen.add(site.name)
        if self._activations:
            measured.add_call(site, call)

    def _on_kernel(self, rows: KernelRows, path: tuple[str, ...]) -> None:
        measured = self._measured
        if measured is None or self._is_stale():
            return
        statistics = rows.statistics()
        site = self._book.kernel_site(len(statistics.rows_h), path)
        if site is None or site.name in self._seen_before:
            return
        self._seen.add(site.name)
        if self._activations:
            measured.add_statistics(site, statistics)

    def _heads_at(self, path: Sequence[str]) -> int | None:
        return self._book.heads_at(path)  # the book of the moment: it is a new one once modules have changed

    def _on_exit(self) -> None:
        measured = self._measured
        self._look_for_changes = True
        self._forward_ended = True
        if measured is None or self._stale:
            return
        parameters: dict[str, nn.Parameter] | None = None
        for site in self._book.sites:
            if site.name in self._seen:
                parameters = parameters or dict(self._model.named_parameters(remove_duplicate=False))
                self.contained_for(site.name, measured.add_weights, site, parameters)
        self._seen_before = set(self._seen)
