"""The book of sites: which site an attention call belongs to, and what is known of its layout."""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from diagnostics.attach.calls import AttentionCall
from diagnostics.attach.composed import compose, frozen_gain, named_gain, says
from diagnostics.attach.flags import OF_THE_PROJECTIONS, call_flags
from diagnostics.attach.observe import Observer
from diagnostics.attach.probe import Support, Unknown, aligned, supports_of
from diagnostics.attach.products import Product
from diagnostics.attach.rules import candidate_sites
from diagnostics.attach.site import Projection, Site, Sites, contiguous_rows

_NAMED_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


class SiteBook:
    """All sites of a model: found by names at attach, confirmed or found by calls.

    Args:
        model: the attached model.
        layers: regular expression over module paths; only matching sites are kept (None: all).
    """

    def __init__(self, model: nn.Module, layers: re.Pattern[str] | None = None) -> None:
        self._modules = dict(model.named_modules())
        self._order = {name: index for index, name in enumerate(self._modules)}
        self._layers = layers
        self._known: dict[str, Site] = {}
        self.skipped: dict[str, str] = {}
        self._confirmed: set[str] = set()
        self._uncalled: set[str] = set()
        self._settled = False
        self._met_unprobed = False
        self._unwanted: set[tuple[str, ...]] = set()
        for site in candidate_sites(model):
            if self._wanted(site.name):
                self._known[site.name] = site

    @property
    def sites(self) -> Sites:
        found = sorted(self._known.values(), key=lambda site: self._order.get(site.name, len(self._order)))
        return Sites([site for site in found if site.name not in self.skipped], self.skipped)

    @property
    def settled(self) -> bool:
        """Whether the last step brought no layout to probe, so that products need not be remembered in the next."""
        return self._settled

    def end_step(self) -> None:
        """Told when a measured step that saw attention ends."""
        self.skip_uncalled()
        self._settled = not self._met_unprobed
        self._met_unprobed = False

    def skip(self, path: str, reason: str) -> None:
        """Leaves out the site at or around a module path; nothing where there is no such module."""
        if path not in self._modules:
            return
        around = [name for name in self._known if path == name or path.startswith(f"{name}.") or not name]
        self.skipped[max(around, key=len, default=path)] = reason

    def skip_uncalled(self) -> list[str]:
        """Marks the candidates that no observed forward has called; returns their names."""
        uncalled = [name for name in self._known if name not in self._confirmed and name not in self.skipped]
        for name in uncalled:
            self.skip(
                name,
                "its name suggests attention, but no attention call was seen in it in a training forward",
            )
        self._uncalled |= set(uncalled)
        for name in self._named_like_attention():
            self.skipped.setdefault(
                name, "it is named like attention, but computes no softmax attention that was seen"
            )
        return uncalled

    def _named_like_attention(self) -> list[str]:
        """Modules with a matrix and such a name that neither hold a site nor lie in one: linear attention, say."""
        found = [*self._known, *self.skipped]
        return [
            name
            for name, module in self._modules.items()
            if _NAMED_ATTENTION.search(name.rpartition(".")[2])
            and any(parameter.ndim > 1 for parameter in module.parameters())
            and not any(_lies_in(name, other) or _lies_in(other, name) for other in found)
        ]

    def site_of(self, call: AttentionCall, path: Sequence[str], observer: Observer) -> Site | None:
        """The site a call belongs to, its layout confirmed at the first call; None where it is not wanted.

        Args:
            call: the attention call.
            path: paths of the running modules, outermost first.
            observer: gives the matrix products seen just before.
        """
        if tuple(path) in self._unwanted:
            return None
        name = next((name for name in reversed(path) if name in self._known), None)
        if name is not None and name in self._confirmed:
            return None if name in self.skipped else self._known[name]
        site = self._confirm(name, call, path, observer)
        if not self._wanted(site.name):
            self._unwanted.add(tuple(path))
            return None
        kept = tuple(flag for flag in site.flags if flag in OF_THE_PROJECTIONS)
        site = replace(site, flags=kept).with_flags(*call_flags(call, site, observer.products))
        self._known[site.name] = site
        if site.verified == "no" and not observer.wants_products:
            self._met_unprobed = True  # first called late: probed at its call in the next measured step
        else:
            self._confirmed.add(site.name)
        if site.name in self._uncalled:  # called for the first time after all
            self._uncalled.remove(site.name)
            self.skipped.pop(site.name, None)
        return site

    def kernel_site(self, heads: int, path: Sequence[str]) -> Site | None:
        """The site at which a kernel handed in its own numbers; the layout is what names say, if they fit."""
        name = next((name for name in reversed(path) if name in self._known), path[-1])
        if not self._wanted(name) or (name in self.skipped and name not in self._uncalled):
            return None
        if name not in self._confirmed:
            site = self._known.get(name)
            if site is None or site.heads != heads:
                reason = "a kernel handed in its own numbers: q and k were not seen"
                site = Site(name, heads, None, None, layout="unknown", reason=reason)
            self._known[name] = site
            self._confirmed.add(name)
            self._uncalled.discard(name)
            self.skipped.pop(name, None)
        return self._known[name]

    def heads_at(self, path: Sequence[str]) -> int | None:
        """Query heads that names suggest for the innermost site on a path of running modules."""
        return next((self._known[name].heads for name in reversed(path) if name in self._known), None)

    def _wanted(self, name: str) -> bool:
        return self._layers is None or self._layers.search(name) is not None

    def _confirm(
        self, name: str | None, call: AttentionCall, path: Sequence[str], observer: Observer
    ) -> Site:
        if call.weights is not None:
            return self._from_call(name or path[-1], call, observer)
        _, heads, _, head_dim = call.q_bhtk.shape
        products = list(reversed(observer.products))
        suggested = self._known.get(name) if name is not None else None
        found = self._probe(call, products, observer)
        if isinstance(found, Unknown):
            return self._unprobed(name or path[-1], suggested, call, found)
        query, key = found
        return self._from_supports(name or self._owner(path, query, key), query, key, heads, head_dim)

    @staticmethod
    def _probe(
        call: AttentionCall, products: list[Product], observer: Observer
    ) -> tuple[Support, Support] | Unknown:
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # noqa: SLF001 - no public name
            return Unknown(
                "activation checkpointing was active, so the layout could not be probed", contradicts=False
            )
        name_of = observer.parameter_name
        query = supports_of(call.q_bhtk, products, name_of)
        if isinstance(query, Unknown):
            return query
        key = supports_of(call.k_bgsk, products, name_of)
        if isinstance(key, Unknown):
            return key
        # Feature k of q is to meet feature k of k, also where only one of them is made of several parts.
        query_aligned = aligned(query, call.q_bhtk, key)
        if isinstance(query_aligned, Unknown):
            return query_aligned
        key_aligned = aligned(key, call.k_bgsk, query)
        if isinstance(key_aligned, Unknown):
            return key_aligned
        return compose(query_aligned, key_aligned, products, name_of)

    def _from_call(self, name: str, call: AttentionCall, observer: Observer) -> Site:
        """A call that names its own weights needs no probe."""
        assert call.weights is not None
        _, heads, _, head_dim = call.q_bhtk.shape
        (weight_q, row_q), (weight_k, row_k) = call.weights
        names = observer.parameter_name(weight_q), observer.parameter_name(weight_k)
        site = Site(
            name, heads, heads, head_dim, verified="call", kv_head=tuple(range(heads)),
            layout="one matrix, rows [q heads; k heads; v heads]" if weight_q is weight_k else "separate q and k",
            flags=("cross",) if call.cross else (),
        )  # fmt: skip
        if names[0] is None or names[1] is None:
            return replace(
                site, reason="the projection's weight is no parameter of the model (parametrised or merged)"
            )
        return replace(
            site,
            query=Projection(names[0], contiguous_rows(row_q, heads, head_dim)),
            key=Projection(names[1], contiguous_rows(row_k, heads, head_dim)),
        )

    def _from_supports(self, name: str, query: Support, key: Support, heads: int, head_dim: int) -> Site:
        # Keys that were repeated for their query heads before the call show the same features again.
        owned = key.identities
        distinct = list(dict.fromkeys(owned))
        shared = heads // len(owned) if len(owned) < heads else 1
        kv_head = tuple(distinct.index(owned[head // shared]) for head in range(heads))
        flags = [*query.flags, *key.flags]
        if not query.sources & key.sources and not query.parameters & key.parameters:
            flags.append("cross")
        first = [owned.index(identity) for identity in distinct]
        wq, wk = query.projection(range(heads)), key.projection(first)
        site = Site(
            name, heads, len(distinct), head_dim, verified="probe", kv_head=kv_head,
            layout=_describe(wq, wk, head_dim, kv_head) + says(query, key), query=wq, key=wk,
        ).with_flags(*flags)  # fmt: skip
        frozen = frozen_gain(self._modules[name], (query, key), head_dim) if name in self._modules else ""
        if not frozen:
            return site
        reason = (
            f"{frozen} is frozen, so whether it is the gain of the norm over q or k could not be verified"
        )
        return replace(site, query=None, key=None, reason=reason)

    def _unprobed(self, name: str, suggested: Site | None, call: AttentionCall, unknown: Unknown) -> Site:
        """Rules that fit the call's shapes are used, marked as unverified; else there are no spectra.

        Rules do not answer where the probe ran and found that no rows of one parameter are it.
        """
        _, heads, _, head_dim = call.q_bhtk.shape
        if (
            not unknown.contradicts
            and suggested is not None
            and suggested.query is not None
            and (suggested.heads, suggested.head_dim) == (heads, head_dim)
        ):
            gain = named_gain(self._modules[suggested.name])
            if gain:
                reason = f"{unknown.reason}, nor the norm of {gain} be verified"
                return replace(suggested, query=None, key=None, reason=reason)
            return replace(suggested, verified="no", layout=f"{suggested.layout} (by name; {unknown.reason})")
        return Site(
            name, heads, call.k_bgsk.shape[1], head_dim, layout="unknown", reason=unknown.reason,
            verified="probe" if unknown.contradicts else "no", flags=unknown.flags,
        )  # fmt: skip

    @staticmethod
    def _owner(path: Sequence[str], query: Support, key: Support) -> str:
        """The innermost running module that owns both projections."""
        for name in reversed(path):
            prefix = f"{name}." if name else ""
            if query.product.parameter.startswith(prefix) and key.product.parameter.startswith(prefix):
                return name
        return path[-1]


def _lies_in(inner: str, outer: str) -> bool:
    return inner == outer or not outer or inner.startswith(f"{outer}.")


def _describe(query: Projection, key: Projection, head_dim: int, kv_head: tuple[int, ...]) -> str:
    heads, key_rows = len(query.rows), list(key.rows)
    side = "columns" if query.transposed else "rows" if query.view is None else "axes of a tensor"
    group = heads // len(key_rows)
    pairing = ""
    if group > 1:
        blocked = kv_head == tuple(head // group for head in range(heads))
        pairing = f", key head h // {group}" if blocked else f", key head h mod {len(key_rows)}"
    if query.parameter != key.parameter:
        plain = query.rows == contiguous_rows(0, heads, len(query.rows[0]))
        return f"separate q and k, {side}" + ("" if plain else " interleaved") + pairing
    if query.rows == contiguous_rows(0, heads, head_dim) and key_rows == list(
        contiguous_rows(heads * head_dim, len(key_rows), head_dim)
    ):
        return f"one matrix, {side} [q heads; k heads; v heads]{pairing}"
    starts_q, starts_k = [row[0] for row in query.rows], [row[0] for row in key_rows]
    if len(key_rows) == heads and all(k - q == head_dim for q, k in zip(starts_q, starts_k, strict=True)):
        return f"one matrix, {side} interleaved per head [q, k, v]{pairing}"
    if group > 1 and starts_k[0] == group * head_dim:
        return f"one matrix, {side} interleaved per key head [q x {group}, k, v]{pairing}"
    return f"one matrix, {side} in an order of its own: first q at {starts_q[0]}, first k at {starts_k[0]}{pairing}"
