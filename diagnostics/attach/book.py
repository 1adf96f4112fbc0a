"""The book of sites: which site an attention call belongs to, and what is known of its layout."""

import re
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from diagnostics.attach.calls import AttentionCall
from diagnostics.attach.flags import OF_THE_PROJECTIONS, call_flags
from diagnostics.attach.observe import Observer
from diagnostics.attach.probe import Product, Support, agrees, supports_of
from diagnostics.attach.rules import candidate_sites
from diagnostics.attach.site import Projection, Site, Sites, contiguous_rows


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
        return uncalled

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
        twin = self._twin(name) if name is not None else None
        if suggested is not None and twin is not None and self._agrees(suggested, twin, call, products):
            return replace(
                suggested, heads=twin.heads, kv_heads=twin.kv_heads, head_dim=twin.head_dim, layout=twin.layout,
                flags=twin.flags, kv_head=twin.kv_head, verified="probe",
                query=self._moved(twin, suggested, "query"), key=self._moved(twin, suggested, "key"),
            )  # fmt: skip
        query, key = self._probe(call, products)
        if isinstance(query, str) or isinstance(key, str):
            reason = query if isinstance(query, str) else str(key)
            return self._unprobed(name or path[-1], suggested, call, reason)
        return self._from_supports(name or self._owner(path, query, key), query, key, heads, head_dim)

    @staticmethod
    def _probe(call: AttentionCall, products: list[Product]) -> tuple[Support | str, Support | str]:
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:  # noqa: SLF001 - no public name
            reason = "activation checkpointing was active, so the layout could not be probed"
            return reason, reason
        return supports_of(call.q_bhtk, products), supports_of(call.k_bgsk, products)

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
        distinct = list(dict.fromkeys(key.rows))
        shared = heads // len(key.rows) if len(key.rows) < heads else 1
        kv_head = tuple(distinct.index(key.rows[head // shared]) for head in range(heads))
        flags = [*query.flags, *key.flags]
        if query.product.source != key.product.source and query.product.parameter != key.product.parameter:
            flags.append("cross")
        return Site(
            name, heads, len(distinct), head_dim, verified="probe", kv_head=kv_head,
            layout=_describe(query, key, distinct, kv_head),
            query=query.projection(), key=replace(key.projection(), rows=tuple(distinct)),
        ).with_flags(*flags)  # fmt: skip

    @staticmethod
    def _unprobed(name: str, suggested: Site | None, call: AttentionCall, reason: str) -> Site:
        """Rules that fit the call's shapes are used, marked as unverified; else there are no spectra."""
        _, heads, _, head_dim = call.q_bhtk.shape
        fits = suggested is not None and suggested.query is not None
        if suggested is not None and fits and (suggested.heads, suggested.head_dim) == (heads, head_dim):
            return replace(suggested, verified="no", layout=f"{suggested.layout} (by name; {reason})")
        return Site(name, heads, call.k_bgsk.shape[1], head_dim, layout="unknown", reason=reason)

    def _twin(self, name: str) -> Site | None:
        """A confirmed site of the same class and shapes, whose layout this one most likely shares."""
        signature = self._signature(name)
        for other in self._confirmed:
            site = self._known.get(other)
            if (
                site is not None
                and site.verified == "probe"
                and site.query
                and self._signature(other) == signature
            ):
                return site
        return None

    def _signature(self, name: str) -> tuple[object, ...]:
        module = self._modules[name]
        return (type(module), tuple((key, tuple(value.shape)) for key, value in module.named_parameters()))

    def _agrees(self, suggested: Site, twin: Site, call: AttentionCall, products: list[Product]) -> bool:
        query, key = self._moved(twin, suggested, "query"), self._moved(twin, suggested, "key")
        by_parameter = {product.parameter: product for product in reversed(products)}
        if (
            query is None
            or key is None
            or query.parameter not in by_parameter
            or key.parameter not in by_parameter
        ):
            return False
        if "qk_norm" in twin.flags:
            return False  # a norm over all heads makes every feature matter: the full probe tells
        key_rows = (
            [key.rows[kv] for kv in twin.kv_head] if call.k_bgsk.shape[1] == twin.heads else list(key.rows)
        )
        return agrees(call.q_bhtk, by_parameter[query.parameter], query.rows) and agrees(
            call.k_bgsk, by_parameter[key.parameter], key_rows
        )

    @staticmethod
    def _moved(twin: Site, site: Site, which: str) -> Projection | None:
        """The twin's projection under this site's parameter names."""
        projection = twin.query if which == "query" else twin.key
        if projection is None or not projection.parameter.startswith(twin.name):
            return None
        return replace(projection, parameter=site.name + projection.parameter[len(twin.name) :])

    @staticmethod
    def _owner(path: Sequence[str], query: Support, key: Support) -> str:
        """The innermost running module that owns both projections."""
        for name in reversed(path):
            prefix = f"{name}." if name else ""
            if query.product.parameter.startswith(prefix) and key.product.parameter.startswith(prefix):
                return name
        return path[-1]


def _describe(query: Support, key: Support, key_rows: list[tuple[int, ...]], kv_head: tuple[int, ...]) -> str:
    side = "columns" if query.product.transposed else "rows"
    heads, head_dim = len(query.rows), len(query.rows[0])
    group = heads // len(key_rows)
    pairing = ""
    if group > 1:
        blocked = kv_head == tuple(head // group for head in range(heads))
        pairing = f", key head h // {group}" if blocked else f", key head h mod {len(key_rows)}"
    if query.product.parameter != key.product.parameter:
        plain = query.rows == contiguous_rows(0, heads, head_dim)
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
