"""What one measured step collects, as small tensors on the model's device, until the worker fetches them."""

from dataclasses import dataclass, field

import torch
from torch import nn

from diagnostics.attach.calls import AttentionCall
from diagnostics.attach.sampling import observed_rows
from diagnostics.attach.site import Site
from diagnostics.measure.attention import RowStatistics, observe_rows
from diagnostics.measure.spectra import HeadSpectra, head_spectra
from diagnostics.record.update_sizes import GroupUpdates


@dataclass
class MeasuredStep:
    """Everything measured in one step.

    Attributes:
        attention: statistics of each call of each site, by site name.
        spectra: spectra of each site's heads, by site name.
        updates: updates by groups of equal shape.
    """

    attention: dict[str, list[RowStatistics]] = field(default_factory=dict)
    spectra: dict[str, HeadSpectra] = field(default_factory=dict)
    updates: list[GroupUpdates] = field(default_factory=list)

    @torch.no_grad()
    def add_call(self, site: Site, call: AttentionCall) -> None:
        # Autocast would bring the logits back to half precision, where collapse cannot be measured.
        with torch.autocast(call.q_bhtk.device.type, enabled=False):
            rows = observed_rows(call)
            statistics = observe_rows(
                rows.q_bhrk, rows.k_bgsk, scale=rows.scale, visible=rows.visible, bias=rows.bias
            )
        self.attention.setdefault(site.name, []).append(statistics)

    @torch.no_grad()
    def add_spectra(self, site: Site, parameters: dict[str, nn.Parameter]) -> None:
        """Spectra of a site from its weights; taken while the forward's weights are still in place."""
        if site.query is None or site.key is None:
            return
        with torch.autocast(parameters[site.query.parameter].device.type, enabled=False):
            self.spectra[site.name] = head_spectra(
                site.query.weight_hkd(parameters),
                site.key.weight_hkd(parameters),
                torch.tensor(site.kv_head, device=parameters[site.query.parameter].device),
            )
