"""An independent answer to what a model's attention really computed.

The model is copied to float64 and run once more on the same inputs, attention decomposed to its plain
mathematics; a dispatch mode, far below the functions that the recorder watches, sees the input of every softmax.

Shape suffixes: B sequences, H query heads, T query rows, S keys.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from zoo_case import Array, Case, array, quiet_library

_SOFTMAXES = (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default)
_FUSED = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_HIDDEN = -5e3
"""Masks are -1e4, finfo.min or -inf; the logits of these models stay within a few hundred, Swin's -100 included."""


@dataclass
class HeadAnswer:
    """One head over all rows that see a key: entropies in nats, the largest logit of a visible key."""

    entropy: list[float] = field(default_factory=list)
    fraction: list[float] = field(default_factory=list)
    largest: float = -np.inf

    def columns(self) -> dict[str, float]:
        """By the names of the attention table."""
        return {
            "entropy": float(np.mean(self.entropy)),
            "entropy_min": min(self.entropy),
            "entropy_frac": float(np.mean(self.fraction)),
            "max_logit": self.largest,
            "rows": float(len(self.entropy)),
        }


def reference(case: Case, model: nn.Module, heads: Mapping[str, int]) -> dict[str, list[dict[str, float]]]:
    """The attention columns by site and head, in float64.

    Args:
        case: its loss is run.
        model: float32, with dropout rate 0; left as it is.
        heads: query heads by module path of the site.
    """
    double = copy.deepcopy(model).double()
    if case.logits is not None:
        return {name: _answers([logits]) for name, logits in case.logits(double).items()}
    with quiet_library(), _Softmaxes(double, heads) as seen, sdpa_kernel(SDPBackend.MATH):
        case.loss(double)
    return {
        name: _answers([_by_head(logits, heads[name]) for logits in calls], sinks=seen.sinks[name])
        for name, calls in seen.logits.items()
    }


def _by_head(logits: Array, heads: int) -> Array:
    """Logits as (B, H, T, S), from (B, H, T, S), (B, T, H, S) or (B H, T, S)."""
    if logits.ndim == 3:
        return logits.reshape(-1, heads, *logits.shape[-2:])
    if logits.shape[1] != heads:
        logits = logits.swapaxes(1, 2)
    assert logits.shape[1] == heads, f"{logits.shape} has no {heads} heads"
    return logits


def _answers(calls: Iterable[Array], *, sinks: bool = False) -> list[dict[str, float]]:
    """Row by row in float64 numpy; a sink, the last column, takes part in the softmax and is no key."""
    answers: dict[int, HeadAnswer] = {}
    for logits_bhts in calls:
        for rows_hts in logits_bhts:
            for head, rows_ts in enumerate(rows_hts):
                for row in rows_ts:
                    _add_row(answers.setdefault(head, HeadAnswer()), row, sinks=sinks)
    return [answer.columns() for _, answer in sorted(answers.items())]


def _add_row(answer: HeadAnswer, row: Array, *, sinks: bool) -> None:
    visible = row[row > _HIDDEN]
    keys = visible[:-1] if sinks else visible
    if not keys.size:
        return
    p = np.exp(visible - visible.max())
    p /= p.sum()
    entropy = -float(np.sum(p[p > 0] * np.log(p[p > 0])))
    answer.entropy.append(entropy)
    answer.largest = max(answer.largest, float(keys.max()))
    if visible.size > 1:
        answer.fraction.append(entropy / float(np.log(visible.size)))


def _fused_logits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002 - the signature of the operator
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> Array:
    """Logits of the fused kernel, which libraries that choose their kernel themselves do not decompose."""
    q, k = array(query), array(key)
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    logits: Array = (q @ k.swapaxes(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if attn_mask is not None:
        logits = logits + array(attn_mask)
    if is_causal:
        logits = np.where(np.tri(*logits.shape[-2:]) > 0, logits, -np.inf)
    return logits


class _Softmaxes(TorchDispatchMode):
    """Collects the inputs of softmaxes over the last dimension inside the given modules."""

    def __init__(self, model: nn.Module, sites: Iterable[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.logits: dict[str, list[Array]] = {name: [] for name in sites}
        self.sinks: dict[str, bool] = dict.fromkeys(self.logits, False)
        self._running: list[str] = []
        self._kept: list[Tensor] = []  # an id is a tensor's own only as long as the tensor lives
        self._before_shift: dict[int, Tensor] = {}
        self._joined: set[int] = set()
        self._handles: list[Any] = []
        for name in self.logits:
            module = model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._entering(name)))
            self._handles.append(module.register_forward_hook(lambda *_: self._left()))

    def _entering(self, name: str) -> Callable[..., None]:
        return lambda *_: self._running.append(name)

    def _left(self) -> None:
        self._running.pop()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self._running:
            return result
        if func is _FUSED:
            self.logits[self._running[-1]].append(_fused_logits(*args, **(kwargs or {})))
        elif func in _SOFTMAXES and args[0].ndim > 2 and args[1] in (-1, args[0].ndim - 1):
            self._collect(args[0])
        elif func is torch.ops.aten.sub.Tensor and args[1].ndim and args[1].shape[-1] == 1:
            # Some models subtract the row's largest logit before the softmax; what they computed is what was there before.
            self._keep(result)
            self._before_shift[id(result)] = args[0]
            if id(args[0]) in self._joined:
                self._joined.add(id(result))
        elif func is torch.ops.aten.cat.default and args[0][-1].shape[-1] == 1 and result.shape[-1] > 1:
            self._keep(result)
            self._joined.add(id(result))
        return result

    def _keep(self, tensor: Tensor) -> None:
        self._kept.append(tensor)

    def _collect(self, logits: Tensor) -> None:
        name = self._running[-1]
        self.sinks[name] |= id(logits) in self._joined
        before = self._before_shift.get(id(logits), logits)
        self.logits[name].append(array(before))
