"""An attention site: one place in the model where queries meet keys, and how its weights lie.

Shape suffixes: H query heads, G key heads, K head size.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

FLAGS = ("rope", "qk_norm", "softcap", "sink", "bias", "window", "cross")


@dataclass(frozen=True)
class View:
    """A parameter seen as (features, in), by strides over its own elements in row-major order.

    Attributes:
        size, stride: of the feature axes, then of the input axes.
        offset: the first element.
        features: how many of the axes are features.
    """

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    features: int

    def starts(self) -> list[int]:
        """The element at which each feature's weights begin."""
        found = [self.offset]
        for size, stride in zip(self.size[: self.features], self.stride[: self.features], strict=True):
            found = [start + index * stride for start in found for index in range(size)]
        return found

    def weight_fi(self, parameter: Tensor) -> Tensor:
        flat = parameter.detach().reshape(-1)
        seen = flat.as_strided(self.size, self.stride, int(flat.storage_offset()) + self.offset)
        features = math.prod(self.size[: self.features])
        return seen.reshape(features, -1)


@dataclass(frozen=True)
class Gain:
    """What a norm multiplies the heads' features by.

    Attributes:
        parameter: its name.
        at_hk: for each head and feature, the element of the parameter.
        plus: added to it; 1 where the parameter holds the gain less one, as in Gemma.
    """

    parameter: str
    at_hk: tuple[tuple[int, ...], ...]
    plus: float = 0.0

    def values_hk(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        values = parameters[self.parameter].detach().reshape(-1)
        values_hk = values[torch.tensor(self.at_hk, device=values.device)]
        return values_hk.to(torch.promote_types(values.dtype, torch.float32)) + self.plus


@dataclass(frozen=True)
class Projection:
    """Where the rows of one projection (Wq or Wk) lie in a parameter, and what they are composed with.

    Attributes:
        parameter: name as named_parameters() of the attached model gives it.
        rows: for each head, the output features it owns, in order.
        transposed: True where the parameter is (in, out), as in GPT-2's Conv1D: features are columns.
        view: how a parameter that is no such matrix becomes (features, in).
        gain: multiplies the rows, None where nothing does.
        inner: the projection whose output this one multiplies (a latent, as in MLA); its one "head" is the latent.
        more: projections that give each head its further features, after these.
    """

    parameter: str
    rows: tuple[tuple[int, ...], ...]
    transposed: bool = False
    view: View | None = None
    gain: Gain | None = None
    inner: "Projection | None" = None
    more: "tuple[Projection, ...]" = ()

    def each(self) -> "Iterator[Projection]":
        """This projection and all that it is composed with."""
        yield self
        for other in (self.inner, *self.more):
            if other is not None:
                yield from other.each()

    def weight_hkd(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """The heads' weights, (heads, K, in): rows of the parameter, times gains and inner projections.

        Products are formed in float64 (float32 on Metal, which has no other).
        """
        w_hkd = self._rows_hkd(parameters[self.parameter])
        if self.gain is not None:
            gain_hk = self.gain.values_hk(parameters)
            w_hkd = w_hkd.to(torch.promote_types(w_hkd.dtype, torch.float32)) * gain_hk[..., None]
        if self.inner is not None:
            exact = torch.float32 if w_hkd.device.type == "mps" else torch.float64
            with torch.autocast(w_hkd.device.type, enabled=False):
                w_hkd = w_hkd.to(exact) @ self.inner.weight_hkd(parameters)[0].to(exact)
        if not self.more:
            return w_hkd
        parts = [w_hkd, *(part.weight_hkd(parameters) for part in self.more)]
        widest = torch.float32
        for part in parts:
            widest = torch.promote_types(widest, part.dtype)
        return torch.cat([part.to(widest) for part in parts], dim=1)

    def _rows_hkd(self, parameter: nn.Parameter) -> Tensor:
        weight = parameter.detach()
        if self.view is not None:
            weight_od = self.view.weight_fi(weight)
        else:
            weight_od = weight.t() if self.transposed else weight
        rows_hk = torch.tensor(self.rows, device=weight.device)
        return weight_od.reshape(weight_od.shape[0], -1)[rows_hk]


@dataclass(frozen=True)
class Site:
    """One attention site.

    Attributes:
        name: module path as named_modules() gives it.
        heads: query heads H, None until it is known.
        kv_heads: key heads G, None until it is known.
        head_dim: K, None until it is known.
        scale: factor on q.k, None: read from each call.
        layout: in words, how Q and K lie in the parameters.
        flags: what stands between the projections and the logits, out of `FLAGS`.
        verified: how the layout was checked: `no` (name rules alone), `probe` or `call`.
        query, key: where the rows lie, None where that could not be found; then there are no spectra.
        kv_head: for each query head, the index of its own key head.
        reason: why there are no spectra, empty where there are.
    """

    name: str
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    scale: float | None = None
    layout: str = "not known before the first measured step"
    flags: tuple[str, ...] = ()
    verified: str = "no"
    query: Projection | None = field(default=None, repr=False)
    key: Projection | None = field(default=None, repr=False)
    kv_head: tuple[int, ...] = field(default=(), repr=False)
    reason: str = ""

    def with_flags(self, *more: str) -> "Site":
        return replace(self, flags=tuple(flag for flag in FLAGS if flag in self.flags or flag in more))

    def to_dict(self) -> dict[str, object]:
        """What run.json says of the site."""
        return {
            "name": self.name,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "scale": self.scale,
            "layout": self.layout,
            "flags": list(self.flags),
            "verified": self.verified,
            "reason": self.reason,
        }


class Sites(Sequence[Site]):
    """The sites of a model in module order; `skipped` says of each other candidate why it is left out."""

    def __init__(self, sites: Sequence[Site] = (), skipped: Mapping[str, str] | None = None) -> None:
        self._sites = tuple(sites)
        self.skipped: dict[str, str] = dict(skipped or {})

    def __getitem__(self, index: int | slice) -> Site | tuple[Site, ...]:  # type: ignore[override]
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __repr__(self) -> str:
        lines = [
            f"{site.name or '(model)'}: {site.heads} heads, {site.kv_heads} key heads of {site.head_dim}, "
            f"layout {site.layout} (verified: {site.verified})"
            + (f", {', '.join(site.flags)}" if site.flags else "")
            for site in self._sites
        ]
        lines += [f"{name or '(model)'}: skipped, {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines) or "no attention sites"


def contiguous_rows(
    start: int, heads: int, head_dim: int, stride: int | None = None
) -> tuple[tuple[int, ...], ...]:
    """Rows of `heads` heads of `head_dim` features, one head every `stride` features from `start` on."""
    step = head_dim if stride is None else stride
    return tuple(tuple(range(start + head * step, start + head * step + head_dim)) for head in range(heads))
