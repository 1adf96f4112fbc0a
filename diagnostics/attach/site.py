"""An attention site: one place in the model where queries meet keys, and how its weights lie.

Shape suffixes: H query heads, G key heads, K head size.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

FLAGS = ("rope", "qk_norm", "softcap", "sink", "bias", "window", "cross")


@dataclass(frozen=True)
class Projection:
    """Where the rows of one projection (Wq or Wk) lie in a parameter.

    Attributes:
        parameter: name as named_parameters() of the attached model gives it.
        rows: for each head, the output features it owns, in order.
        transposed: True where the parameter is (in, out), as in GPT-2's Conv1D: features are columns.
    """

    parameter: str
    rows: tuple[tuple[int, ...], ...]
    transposed: bool = False

    def weight_hkd(self, parameters: Mapping[str, nn.Parameter]) -> Tensor:
        """The heads' weights, (heads, K, in), gathered from the parameter."""
        weight = parameters[self.parameter].detach()
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
