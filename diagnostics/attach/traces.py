"""Whether a model can hold attention at all: only one without a single trace of it is refused at attach.

What names do not show may still be found at the first forward, so the doubt is in the model's favour: code
that multiplies activations, or that cannot be looked into, may hold attention.
"""

import dis
import functools
import re
from collections.abc import Iterator
from types import CodeType
from typing import Any

from torch import nn

_TRACES = re.compile(
    r"attn|attention|attend|softmax|sdpa|flex_|multi_?head|matmul|bmm|einsum|logsumexp", re.IGNORECASE
)


def may_hold_attention(model: nn.Module) -> bool:
    """Whether any name in the model, or any code of its own, leaves room for attention."""
    return any(
        isinstance(module, nn.MultiheadAttention | nn.Softmax)
        or _TRACES.search(name)
        or _shows_traces(module)
        for name, module in model.named_modules()
    )


def _shows_traces(module: nn.Module) -> bool:
    own_kinds = [
        kind for kind in type(module).__mro__ if not _is_torchs(kind.__module__) and kind is not object
    ]
    if any(_TRACES.search(kind.__name__) for kind in own_kinds):
        return True
    members = [member for kind in own_kinds for member in vars(kind).values() if callable(member)]
    # A function handed to the constructor is part of the model's code as well.
    members += [
        value for value in vars(module).values() if callable(value) and not isinstance(value, nn.Module)
    ]
    return any(_TRACES.search(word) for member in members for word in _words(member, set()))


def _words(function: Any, seen: set[CodeType]) -> Iterator[str]:  # noqa: ANN401 - any callable
    """Every name that a function uses, and those of the functions it names; "matmul" for its operator."""
    while isinstance(function, functools.partial):
        function = function.func
    function = getattr(function, "__wrapped__", function)
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        # Torch's own functions and classes say what they are; what else has no code to read may be anything.
        yield getattr(function, "__name__", "attention") if _is_torchs(_module_of(function)) else "attention"
        return
    scope = getattr(function, "__globals__", {})
    for part in _nested(code):
        if part in seen:
            continue
        seen.add(part)
        yield from part.co_names
        if any(instruction.argrepr in ("@", "@=") for instruction in dis.get_instructions(part)):
            yield "matmul"
        for name in part.co_names:
            called = scope.get(name)
            if hasattr(called, "__code__") and not _is_torchs(_module_of(called)):
                yield from _words(called, seen)


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _module_of(thing: object) -> str:
    return str(getattr(thing, "__module__", "") or "")


def _is_torchs(name: str) -> bool:
    return name == "torch" or name.startswith("torch.")
