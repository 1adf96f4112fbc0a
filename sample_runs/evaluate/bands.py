"""`--write-bands`: the bands that ship with the package, from all families."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diagnostics.detect.bands import PLAIN, shipped_bands

from .channel import OFF, Channel, edge_of
from .corpus import HEALTHY, Course
from .machine import Values
from .scores import kind_of

BANDS = Path(__file__).resolve().parents[2] / "diagnostics" / "detect" / "bands.json"


def bands_document(
    channels: Sequence[Channel], courses: Sequence[Course], powers: Mapping[str, int]
) -> dict[str, Any]:
    """What `bands.json` holds.

    Args:
        channels: of all detectors, those for information included.
        courses: all runs; healthy quantiles are of the healthy ones.
        powers: fitted lattice powers by channel; a detector without one keeps the edge it has.
    """
    healthy = [course.name for course in courses if course.label == HEALTHY]
    shipped = shipped_bands()
    detectors: dict[str, Any] = {}
    for kind, band in shipped.items():
        own = [channel for channel in channels if kind_of(channel.name) == kind]
        edges = dict(band.edge)
        for channel in own:
            power = powers.get(channel.name, OFF)
            if power != OFF and not channel.pinned:
                edges[channel.name.partition("@")[2] or PLAIN] = edge_of(power)
        detectors[kind] = {"edge": edges, "healthy": _quantiles(own, healthy)}
    return {"detectors": detectors}


def _quantiles(channels: Sequence[Channel], healthy: Sequence[str]) -> dict[str, float]:
    """Of the signal at all measured steps of the healthy runs; nothing where it was never measured."""
    parts = [
        channel.traces[name].values for channel in channels for name in healthy if name in channel.traces
    ]
    values: Values = np.concatenate(parts) if parts else np.empty(0)
    values = values[np.isfinite(values)]
    if not len(values):
        return {}
    found = {"p50": np.quantile(values, 0.5), "p99": np.quantile(values, 0.99), "max": values.max()}
    return {name: float(f"{value:.4g}") for name, value in found.items() if math.isfinite(value)}


def write_bands(document: Mapping[str, Any], path: Path = BANDS) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    shipped_bands.cache_clear()
