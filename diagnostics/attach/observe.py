"""Seeing q and k where they enter attention, on measured steps only, without touching the model.

Armed, two process-wide module hooks keep a stack of the model's running modules, and a torch-function mode
sees the attention calls made inside it. Nothing is installed on the model itself: what is pickled, copied
or saved while attached carries nothing of ours, and torch's own fast paths stay as they are.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils.hooks import RemovableHandle

from diagnostics.attach import flex
from diagnostics.attach.beside import Beside
from diagnostics.attach.calls import AttentionCall, multi_head_call, scaled_dot_product_call
from diagnostics.attach.kernels import KernelRows, listen, unlisten
from diagnostics.attach.products import WATCHED, Product, product_of
from diagnostics.attach.trail import PRODUCTS as LOGIT_PRODUCTS
from diagnostics.attach.trail import SOFTMAXES, LogitTrail

_CALLS: Mapping[Callable[..., Any], Callable[..., AttentionCall]] = {
    flex.OPERATOR: flex.flex_call,
    functional.scaled_dot_product_attention: scaled_dot_product_call,
    functional.multi_head_attention_forward: multi_head_call,
}
_FAST_PATHS = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
_PRODUCTS_KEPT = 16
"""The projections of an attention call are among the last few products before it; older outputs are let go."""

CallSink = Callable[[AttentionCall, tuple[str, ...], "Observer"], None]


class Observer:
    """Watches the forwards of one model while armed.

    Args:
        model: the attached model.
        on_call: receives each attention call with the paths of the running modules, outermost first; called
            with the mode off.
        on_kernel: receives what a kernel hands in, with the paths of the running modules.
        on_exit: called when an observed forward of the model ends.
        contained: runs the recorder's own code; returns False where it failed.
        contained_for: as `contained`, for one module path first; a fault there takes only that path out.
        heads_at: head count that names suggest for the running modules, should a call not show it.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        on_call: CallSink,
        on_kernel: Callable[[KernelRows, tuple[str, ...]], None],
        on_exit: Callable[[], None],
        contained: Callable[..., bool],
        contained_for: Callable[..., bool],
        heads_at: Callable[[Sequence[str]], int | None],
    ) -> None:
        self._model = model
        self._on_call = on_call
        self._on_kernel = on_kernel
        self._on_exit = on_exit
        self._contained = contained
        self._contained_for = contained_for
        self._heads_at = heads_at
        self._handles: list[RemovableHandle] = []
        self._names: dict[int, str] = {}
        self._parameters: dict[int, str] = {}
        self._stack: list[tuple[int, str]] = []
        self._thread: int | None = None
        self._mode: _Mode | None = None
        self._paused_below = 0
        self._force = False
        self._compiled = False
        self._beside = Beside(
            model, observed=self._forced, with_graph=lambda: self.wants_products, contained=contained
        )
        self.trail = LogitTrail()
        self.products: deque[Product] = deque(maxlen=_PRODUCTS_KEPT)
        self.wants_products = True
        """Whether matrix products are to be remembered, for the probe; off once every layout is known."""

    @property
    def way(self) -> str:
        """How forwards are observed, for the run's metadata."""
        return "beside the compiled forward" if self._compiled else "in the training forward"

    def arm(self, *, look_again: bool = False) -> None:
        """From now on, forwards of the model are observed.

        Args:
            look_again: whether to search the process for compiled wrappers of the model once more.
        """
        if self._handles:
            return
        # Named anew each time, so that layers added or replaced meanwhile are known.
        self._names = {id(module): name for name, module in self._model.named_modules()}
        self._parameters = {id(parameter): name for name, parameter in self._model.named_parameters()}
        entries = self._beside.entries(look_again=look_again)
        self._compiled = bool(entries)
        if entries:
            self._beside.arm(entries)
        else:
            self._hook()

    def _hook(self) -> None:
        listen(self._hand_over_kernel)
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]

    def disarm(self) -> None:
        """Takes every hook out again; idempotent.

        For the training thread between two forwards: torch walks its table of hooks while a forward raises,
        and keeps function modes per thread.
        """
        self._beside.disarm()
        self._unhook()

    def _unhook(self) -> None:
        unlisten(self._hand_over_kernel)
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stack.clear()
        self._paused_below = 0
        self._stop_mode()
        self.products.clear()
        self.trail.clear()

    @contextmanager
    def _forced(self) -> Iterator[None]:
        """Within it, every forward of the model is observed."""
        self._force = True
        self._hook()
        try:
            yield
        finally:
            self._force = False
            self._unhook()

    def _enter(self, module: nn.Module, _: object) -> None:
        if torch.compiler.is_compiling():
            return  # a region that was compiled unknown to us: traced into nothing, it neither breaks nor sees
        name = self._names.get(id(module))
        if name is None:
            return
        if not self._stack:
            if not (self._force or self._starts_forward()):
                return
            self._thread = threading.get_ident()
        elif self._thread != threading.get_ident():
            return  # the same model in another thread, an evaluation say
        self._stack.append((id(module), name))
        if self._paused_below:
            return
        if _may_take_fast_path(module):
            self._stop_mode()
            self._paused_below = len(self._stack)
        else:
            self._start_mode()

    def _leave(self, module: nn.Module, _: object, __: object) -> None:
        if torch.compiler.is_compiling():
            return
        if self._thread != threading.get_ident() or all(id(module) != running for running, _ in self._stack):
            return
        # A module whose forward raised may have left others above itself.
        while self._stack.pop()[0] != id(module):
            pass
        if len(self._stack) < self._paused_below:
            self._paused_below = 0
            if self._stack:
                self._start_mode()
        if not self._stack:
            self._stop_mode()
            self.products.clear()
            self.trail.clear()
            self._contained(self._on_exit)

    @staticmethod
    def _starts_forward() -> bool:
        """A training forward: gradients are recorded, and it is no recomputation inside a backward."""
        recomputing = torch._C._current_graph_task_id() != -1  # noqa: SLF001 - torch has no public name for it
        tracing = torch._C._get_tracing_state() is not None  # noqa: SLF001 - the public name is untyped
        return torch.is_grad_enabled() and not recomputing and not tracing

    def _start_mode(self) -> None:
        if self._mode is None:
            self._mode = _Mode(self)
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _stop_mode(self) -> None:
        # Modes are a stack: where somebody else's lies on top, ours waits for the next call of this.
        if self._mode is not None and _get_current_function_mode() is self._mode:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None

    def saw(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: object
    ) -> None:
        """Called by the mode after each torch function that ran inside the model."""
        if not self._stack:
            return
        as_call = _CALLS.get(func)
        if as_call is not None:
            self._contained_for(self._stack[-1][1], self._hand_over, as_call, args, kwargs)
            return
        if func in SOFTMAXES:
            if self.trail:
                self._contained_for(self._stack[-1][1], self._hand_over_softmax, args, kwargs)
                self._contained(self.trail.saw, func, args, kwargs, result)
            return
        if self.trail or func in LOGIT_PRODUCTS:
            self._contained(self.trail.saw, func, args, kwargs, result)
        if self.wants_products and func in WATCHED and isinstance(result, Tensor):
            self._contained(self._remember, func, args, kwargs, result)

    def _hand_over(
        self, as_call: Callable[..., AttentionCall], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        path = tuple(name for _, name in self._stack)
        self._on_call(as_call(*args, **kwargs), path, self)

    def _hand_over_kernel(self, rows: Callable[[], KernelRows]) -> None:
        if self._stack:
            path = tuple(name for _, name in self._stack)
            self._contained_for(path[-1], lambda: self._on_kernel(rows(), path))

    def _hand_over_softmax(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        path = tuple(name for _, name in self._stack)
        call = self.trail.call_of(args, kwargs, self._heads_at(path), self._batch())
        if call is not None:
            self._on_call(call, path, self)

    def _batch(self) -> int | None:
        """Sequences in the batch, as the last projection before the call shows them."""
        shown = [product.output.shape[0] for product in self.products if product.output.ndim > 2]  # noqa: PLR2004 - (B, T, features)
        return shown[-1] if shown else None

    def _remember(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor
    ) -> None:
        found = product_of(func, args, kwargs, result, self.parameter_name, self._stack[-1][1])
        if found is not None:
            self.products.append(found)

    def parameter_name(self, parameter: Tensor) -> str | None:
        return self._parameters.get(id(parameter))


def _may_take_fast_path(module: nn.Module) -> bool:
    """Whether torch may run a fused inference kernel for a frozen part: a mode would keep it from doing so."""
    return (
        isinstance(module, _FAST_PATHS)
        and not module.training
        and not any(parameter.requires_grad for parameter in module.parameters())
    )


class _Mode(TorchFunctionMode):
    """Hands every torch function through untouched; the observer looks at arguments and result afterwards."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever the function returns
        named = kwargs or {}
        result = func(*args, **named)
        if torch.compiler.is_compiling():
            return result  # FlexAttention compiles itself even in an eager model, and traces whatever mode is active
        if isinstance(result, Tensor) or func in _CALLS:  # multi_head_attention_forward gives a pair
            self._observer.saw(func, args, named, result)
        return result
