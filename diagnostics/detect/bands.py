"""The healthy bands and alarm edges that ship with the package, measured on the corpus by `make evaluate`."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

PLAIN = "plain"
QK_NORM = "qk_norm"
GROUPS = (PLAIN, QK_NORM)
"""Sites are told apart where their healthy bands differ: with QK-norm, weight spectra do not bound the logits."""


@dataclass(frozen=True)
class Band:
    """Where a detector's signal lies in healthy runs, and from where on it is an alarm.

    Attributes:
        edge: the alarm's edge by group of site; a group that is not named has that of `plain`.
        healthy: of the corpus's healthy runs: `p50`, `p99` of all measured steps and `max`; empty where not known.
    """

    edge: Mapping[str, float]
    healthy: Mapping[str, float] = field(default_factory=dict)

    def of(self, group: str) -> float:
        return self.edge.get(group, self.edge[PLAIN])


Bands = Mapping[str, Band]


def bands_from(document: Mapping[str, Any]) -> dict[str, Band]:
    """Bands by detector name, out of a document as `bands.json` holds it."""
    return {name: Band(entry["edge"], entry.get("healthy", {})) for name, entry in document.items()}


@cache
def shipped_bands() -> Bands:
    """The bands that came with the package."""
    text = files("diagnostics.detect").joinpath("bands.json").read_text(encoding="utf-8")
    return bands_from(json.loads(text)["detectors"])
