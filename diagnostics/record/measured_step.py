"""What one measured step collects: copies made on the training thread, and the measurements made of them later.

Copies of the observed rows, keys and weights cost a tenth of the measurements. On a CPU these are made on the
worker's thread, so that training waits for copies only; on a device they are queued in training's own order.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from diagnostics.attach.calls import AttentionCall
from diagnostics.attach.sampling import ObservedRows, observed_blocks
from diagnostics.attach.site import Site
from diagnostics.measure.attention import RowStatistics
from diagnostics.measure.spectra import HeadSpectra, head_spectra
from diagnostics.record.update_sizes import GroupUpdates, UpdateSizes
from diagnostics.record.update_watch import CapturedUpdate


@dataclass
class MeasuredStep:
    """Everything measured in one step.

    Attributes:
        attention: statistics of each call of each site, by site name.
        spectra: spectra of each site's heads, by site name.
        updates: updates by groups of equal shape.
        captured: the updates as copies, before `complete`.
    """

    attention: dict[str, list[RowStatistics]] = field(default_factory=dict)
    spectra: dict[str, HeadSpectra] = field(default_factory=dict)
    updates: list[GroupUpdates] = field(default_factory=list)
    captured: list[CapturedUpdate] = field(default_factory=list)
    _calls: list[tuple[str, ObservedRows]] = field(default_factory=list)
    _weights: dict[str, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)

    @property
    def on_device(self) -> bool:
        """Whether anything collected lies on another device than the CPU."""
        devices = [rows.device for _, rows in self._calls]
        devices += [weights[0].device for weights in self._weights.values()]
        devices += [one.before_mn.device for one in self.captured]
        return any(device.type != "cpu" for device in devices)

    @torch.no_grad()
    def add_call(self, site: Site, call: AttentionCall) -> None:
        self._calls += [(site.name, rows) for rows in observed_blocks(call)]

    def add_statistics(self, site: Site, statistics: RowStatistics) -> None:
        """What a kernel measured of its own rows."""
        self.attention.setdefault(site.name, []).append(statistics)

    @torch.no_grad()
    def add_weights(self, site: Site, parameters: Mapping[str, nn.Parameter]) -> None:
        """Copies a site's weights while those that the forward used are still in place; once a step."""
        if site.query is None or site.key is None or site.name in self._weights:
            return
        wq_hkd, wk_gkd = site.query.weight_hkd(parameters), site.key.weight_hkd(parameters)
        self._weights[site.name] = (wq_hkd, wk_gkd, torch.tensor(site.kv_head, device=wq_hkd.device))

    def complete(self, sizes: UpdateSizes, contained_for: Callable[..., bool]) -> None:
        """Measures what was collected and lets the copies go; a site that fails is told by its name, the rest goes on."""
        while self._calls:
            name, rows = self._calls.pop(0)
            contained_for(name, self._measure_rows, name, rows)
        while self._weights:
            name, weights = self._weights.popitem()
            contained_for(name, self._measure_weights, name, *weights)
        self.updates += sizes.measure(self.captured)
        self.captured = []

    def _measure_rows(self, name: str, rows: ObservedRows) -> None:
        self.attention.setdefault(name, []).append(rows.statistics())

    def _measure_weights(self, name: str, wq_hkd: Tensor, wk_gkd: Tensor, kv_head_h: Tensor) -> None:
        self.spectra[name] = head_spectra(wq_hkd, wk_gkd, kv_head_h)
