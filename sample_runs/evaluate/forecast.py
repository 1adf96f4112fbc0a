"""Coverage of the forecast's intervals on families that their calibration has not seen."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from diagnostics.detect.bands import shipped_bands
from diagnostics.detect.forecast import shipped_calibration

from .corpus import Course
from .forecast_coverage import CONFIDENCE, Issued, held_out, issued, watched

WITHIN = 0.05
"""How far coverage may lie from what the intervals say."""


def forecast_figures(courses: Sequence[Course]) -> dict[str, Any]:
    """Coverage by held-out family, and of all together under `all`."""
    rule = shipped_calibration().rule
    forecasts: list[Issued] = []
    for course in courses:
        window, over = watched(course, shipped_bands())
        forecasts += issued(window, over, course.name, course.family, rule)
    rows = held_out(forecasts, rule)
    return {
        "confidence": CONFIDENCE,
        "rows": {
            name: {key: _plain(value) for key, value in asdict(row).items()} for name, row in rows.items()
        },
    }


def _plain(value: float) -> float | None:
    """JSON has no NaN."""
    if isinstance(value, int):
        return value
    return round(value, 4) if math.isfinite(value) else None
