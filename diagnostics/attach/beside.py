"""Observing a compiled model: once more, eagerly, on a few sequences of the step's own batch, before its forward.

Nothing may be hooked inside a compiled region: the hooks would be traced, break `fullgraph=True` and recompile.
So the call that enters the region is caught from outside, and the model is run beside it with compilation
switched off, its random states, buffers and attributes put back. The real forward never differs.
"""

import gc
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from diagnostics.attach.sampling import SEQUENCES

_LOOKS = 3
"""How many measured steps look for compiled wrappers among the live objects; later ones only where nothing was seen."""


class Beside:
    """Catches the outermost call of a compiled model and observes an eager forward beside it.

    Args:
        model: the attached model.
        observed: context in which forwards of the model are observed, whatever their gradient mode.
        with_graph: whether that forward needs an autograd graph (for the layout probe).
        contained: runs the recorder's own code.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        observed: Callable[[], Any],
        with_graph: Callable[[], bool],
        contained: Callable[..., bool],
    ) -> None:
        self._model = model
        self._observed = observed
        self._with_graph = with_graph
        self._contained = contained
        self._looked = 0
        self._wrappers: list[nn.Module] = []
        self._handles: list[RemovableHandle] = []
        self._replaced: list[tuple[nn.Module, Any]] = []
        self._done = False

    def entries(self, *, look_again: bool = False) -> list[nn.Module]:
        """The modules whose call enters compiled code, outermost; empty for a model that is not compiled."""
        dynamo = sys.modules.get("torch._dynamo.eval_frame")
        if dynamo is None:
            return []
        optimized: type[nn.Module] = dynamo.OptimizedModule
        if self._looked < _LOOKS or look_again:
            self._looked += 1
            live = [thing for thing in gc.get_objects() if issubclass(type(thing), optimized)]
            self._wrappers = [w for w in live if any(module is self._model for module in w.modules())]
        if self._wrappers:
            return self._wrappers
        compiled = any(
            isinstance(module, optimized) or getattr(module, "_compiled_call_impl", None) is not None
            for module in self._model.modules()
        )
        return [self._model] if compiled else []

    def arm(self, entries: list[nn.Module]) -> None:
        self._done = False
        for entry in entries:
            compiled_call = getattr(entry, "_compiled_call_impl", None)
            if compiled_call is None:
                self._handles.append(
                    entry.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
                )
            else:
                self._replaced.append((entry, compiled_call))
                entry._compiled_call_impl = self._catching(entry, compiled_call)  # noqa: SLF001 - there is no hook outside it

    def disarm(self) -> None:
        for handle in self._handles:
            handle.remove()
        for entry, compiled_call in self._replaced:
            entry._compiled_call_impl = compiled_call  # noqa: SLF001 - as above
        self._handles, self._replaced = [], []

    def _catching(self, entry: nn.Module, compiled_call: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - whatever the model takes and gives
            self._before(entry, args, kwargs)
            return compiled_call(*args, **kwargs)

        return call

    def _before(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        in_backward = torch._C._current_graph_task_id() != -1  # noqa: SLF001 - torch has no public name for it
        if self._done or in_backward or not torch.is_grad_enabled():
            return
        self._done = True  # before the run: it calls the entry again
        self._contained(self._run, entry, args, kwargs)

    def _run(self, entry: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # DDP's own forward talks to other ranks; a compiled wrapper complains of hooks even when told to run eagerly.
        target = entry.module if isinstance(entry, nn.parallel.DistributedDataParallel) else entry
        target = getattr(target, "_orig_mod", target)
        few_args, few_kwargs = (args, kwargs) if _sequence_first(self._model) else _few(args, kwargs)
        devices = {p.device for p in self._model.parameters() if p.device.type == "cuda"}
        with (
            warnings.catch_warnings(),
            torch.compiler.set_stance("force_eager"),
            torch.random.fork_rng(devices=list(devices)),
            _put_back(self._model),
            torch.set_grad_enabled(self._with_graph()),
            self._observed(),
        ):
            warnings.filterwarnings(
                "ignore", message="Using `torch.compile\\(module\\)` when there are global hooks"
            )
            target(*few_args, **few_kwargs)


def _few(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The first sequences of every tensor whose first dimension is the batch: the commonest first dimension."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    sizes = Counter(leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0)
    batch = sizes.most_common(1)[0][0] if sizes else 0
    few = [
        leaf.detach()[:SEQUENCES]
        if isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        else leaf
        for leaf in leaves
    ]
    cut: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(few, structure)
    return cut


def _sequence_first(model: nn.Module) -> bool:
    """Whether the first dimension of the inputs may be the sequence, so that cutting it would change attention."""
    return any(getattr(module, "batch_first", True) is False for module in model.modules())


@contextmanager
def _put_back(model: nn.Module) -> Iterator[None]:
    """Restores buffers and attributes that a forward changes: running statistics, counters, auxiliary losses."""
    modules = list(model.modules())
    attributes = [(module, dict(vars(module)), dict(module._buffers)) for module in modules]  # noqa: SLF001 - all of them
    contents = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, saved, buffers in attributes:
            vars(module).clear()
            vars(module).update(saved)
            module._buffers.clear()  # noqa: SLF001 - as above
            module._buffers.update(buffers)  # noqa: SLF001 - as above
        with torch.no_grad():
            # All of them: batch norm writes its running statistics without a trace in the version counter.
            for buffer, saved_buffer in contents:
                buffer.copy_(saved_buffer)
