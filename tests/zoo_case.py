"""What a case of the zoo is, and the small tools with which cases are written.

Shape suffixes: H query heads, G key heads, K head size, O output features, D input features.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Array = NDArray[np.float64]
WIDTH, VOCABULARY, LENGTH, BATCH = 32, 31, 12, 2


class MissingLibraryError(Exception):
    """A library of the zoo is not installed."""


@dataclass(frozen=True)
class Heads:
    """What is known by hand of one attention site.

    Attributes:
        wq, wk: for each query head its own Wq (K, D) and the Wk (K, D') of its own key head, float64.
        kv_heads: number of distinct key heads.
        flags: what the recorder must say stands between the projections and the logits.
        arguable: flags that it may give as well.
        mixed: whether the site has no single Wq and Wk (joint attention of two streams): then `wq` and `wk` give
            sizes only, and spectra must be missing with a reason.
    """

    wq: tuple[Array, ...]
    wk: tuple[Array, ...]
    kv_heads: int
    flags: frozenset[str] = frozenset()
    arguable: frozenset[str] = frozenset()
    mixed: bool = False

    @property
    def head_dim(self) -> int:
        return int(self.wq[0].shape[0])


@dataclass(frozen=True)
class Case:
    """One architecture: how to build it, how to train it, and where its queries and keys lie.

    Attributes:
        build: the model in train mode, its dropout rates as given; every call gives the same weights.
        loss: a training forward on a fixed batch, in the model's own dtype.
        sites: module path to what is known of the site.
        skipped: module paths that the recorder must name as no softmax attention.
        logits: true logits (B, H, T, S) by site where they are no input of an aten softmax (FlexAttention).
    """

    name: str
    library: str
    build: Callable[[float], nn.Module]
    loss: Callable[[nn.Module], Tensor]
    sites: Callable[[nn.Module], dict[str, Heads]]
    skipped: tuple[str, ...] = ()
    logits: Callable[[nn.Module], dict[str, Array]] | None = None


def case(
    name: str,
    library: str,
    make: Callable[[float], nn.Module],
    forward: Callable[[Any], Tensor],
    sites: Callable[[Any], dict[str, Heads]],
    **more: Any,
) -> Case:
    """A case whose loss is a fixed weighted sum of what `forward` returns."""

    def build(dropout: float) -> nn.Module:
        with quiet_library():
            torch.manual_seed(0)
            return randomised(make(dropout)).train()

    return Case(name, library, build, lambda model: weighted(forward(model)), sites, **more)


def imported(name: str) -> Any:
    """A library of the zoo, imported when it is first needed and silenced while it is."""
    package = name.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise MissingLibraryError(
            f"{package} is not installed; `make test` installs it, or pip install -e '.[zoo]'"
        )
    _declare_vision_operators()
    with quiet_library():
        return importlib.import_module(name)


class quiet_library(warnings.catch_warnings):  # noqa: N801 - used as a function
    """Libraries deprecate their own ways at will; that is no finding about ours."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore")


_vision_operators: list[torch.library.Library] = []


def _declare_vision_operators() -> None:
    """Lets torchvision's CUDA build, which PyPI serves, be imported beside a CPU torch.

    Its own operators then cannot be loaded, and it fails on the two that it registers shapes for.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or _vision_operators:
        return
    for folder in spec.submodule_search_locations or ():
        for binary in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(binary)
            except OSError:
                continue
            return
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _vision_operators.append(library)


@torch.no_grad()
def randomised(model: nn.Module) -> nn.Module:
    """Weights redrawn so that attention is far from uniform, norms' gains and biases moved off 1 and 0."""
    generator = torch.Generator().manual_seed(1)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        flat = sum(size > 1 for size in parameter.shape) <= 1
        gain = name.endswith(("gamma", "_scale"))
        if flat or gain:
            parameter.add_(noise if gain and not flat else 0.3 * noise)
        else:
            parameter.copy_(noise if id(parameter) in embeddings else 0.3 * noise)
    return model


def weighted(x: Tensor) -> Tensor:
    """A scalar on which every entry has its own influence."""
    return (x * torch.linspace(-1.0, 1.0, x.numel(), dtype=x.dtype).view(x.shape)).mean()


def dtype_of(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def tokens(rows: int = BATCH, length: int = LENGTH) -> Tensor:
    """Fixed tokens (B, T)."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(2))


def features(model: nn.Module, *shape: int) -> Tensor:
    """A fixed float input in the model's own dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3)).to(dtype_of(model))


def padding(*, left: bool = False, rows: int = BATCH, length: int = LENGTH) -> Tensor:
    """An attention mask (B, T) of ones whose last sequence is three tokens shorter."""
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[-1, :3] = 0
    return mask if left else mask.flip(1)


def array(tensor: Tensor) -> Array:
    return np.asarray(tensor.detach().double().numpy(), dtype=np.float64)


def cut(
    weight_od: Tensor | Array,
    heads: int,
    head_dim: int,
    *,
    start: int = 0,
    stride: int | None = None,
    gain: Tensor | Array | None = None,
) -> list[Array]:
    """The heads' own rows of a projection.

    Args:
        weight_od: (O, D).
        heads, head_dim: how many heads, of which size.
        start: first row of the first head.
        stride: rows from one head's first to the next one's (None: `head_dim`).
        gain: what the model multiplies each head's features by (head_dim), or all heads' (heads * head_dim).
    """
    weight = array(weight_od) if isinstance(weight_od, Tensor) else weight_od
    step = head_dim if stride is None else stride
    pieces = [weight[start + head * step : start + head * step + head_dim] for head in range(heads)]
    assert all(piece.shape[0] == head_dim for piece in pieces)
    if gain is None:
        return pieces
    values = array(gain) if isinstance(gain, Tensor) else gain
    gains = values.reshape(-1, head_dim)
    return [piece * gains[head % len(gains)][:, None] for head, piece in enumerate(pieces)]


def site(
    wq_hkd: Sequence[Array], wk_gkd: Sequence[Array], flags: str | Iterable[str] = "", *, tiled: bool = False
) -> Heads:
    """Pairs each query head with its own key head: h // (H / G), or h mod G where `tiled`."""
    heads, kv_heads = len(wq_hkd), len(wk_gkd)
    own = [head % kv_heads if tiled else head // (heads // kv_heads) for head in range(heads)]
    named = flags.split() if isinstance(flags, str) else flags
    return Heads(tuple(wq_hkd), tuple(wk_gkd[g] for g in own), kv_heads, frozenset(named))


def fused(weight_od: Tensor, heads: int, flags: str = "", *, start: int = 0) -> Heads:
    """A site whose one matrix has the rows [q heads; k heads; v heads]."""
    width = (weight_od.shape[0] - start) // 3
    size = width // heads
    return site(
        cut(weight_od, heads, size, start=start), cut(weight_od, heads, size, start=start + width), flags
    )


def separate(query: Any, key: Any, head_dim: int, flags: str = "", **gains: Tensor) -> Heads:
    """A site with a layer each for queries and keys, one head after the other.

    Args:
        query, key: layers with a weight (O, D).
        head_dim: K.
        flags: as of `site`.
        gains: `q`, `k`: gains that a norm multiplies the heads by.
    """
    heads, kv_heads = query.weight.shape[0] // head_dim, key.weight.shape[0] // head_dim
    return site(
        cut(query.weight, heads, head_dim, gain=gains.get("q")),
        cut(key.weight, kv_heads, head_dim, gain=gains.get("k")),
        flags,
    )
