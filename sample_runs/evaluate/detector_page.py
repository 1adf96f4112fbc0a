"""The table of figures in the detectors' own page: what each reached alone, and the band it ships with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diagnostics.detect.bands import PLAIN, QK_NORM, Band, Bands, shipped_bands
from diagnostics.detect.detectors import DETECTORS

from .report import markdown, placed
from .sections import FIGURES, Row, Section, figures

PAGE = Path(__file__).resolve().parents[2] / "diagnostics" / "detect" / "README.md"
BEGIN, END = "<!-- detectors:begin -->", "<!-- detectors:end -->"
ALONE = FIGURES[:3]
QUANTILES = ("p50", "p99", "max")


def detector_page(text: str, document: Mapping[str, Any], bands: Bands | None = None) -> str:
    """The page with the figures of `document` between its markers.

    Args:
        text: the page as it is.
        document: the evaluation's results.
        bands: healthy quantiles and edges (None: those that ship).

    Raises:
        DiagnosticsError: the markers are not there, once each and in order.
    """
    section = _section(document, shipped_bands() if bands is None else bands)
    return placed(text, markdown([section]), (BEGIN, END))


def _section(document: Mapping[str, Any], bands: Bands) -> Section:
    alone = {row["name"]: row for row in document["ablation"] if row["what"] == "alone"}
    corpus = document["corpus"]
    return Section(
        "Each detector alone",
        f"On {corpus['runs']} runs of {corpus['families']} families, each family held out once: no other detector, the edge "
        "refitted on the other families, a miss counted as a lead of 0. Healthy values, of all measured steps of "
        "healthy runs, and the edge that ships are in units of the detector's signal.",
        ("detector", *ALONE, f"healthy: {' / '.join(QUANTILES)}", "edge"),
        [
            (f"[`{kind}`](#{kind})", *_reached(kind, alone), _healthy(bands[kind]), _edge(bands[kind]))
            for kind in DETECTORS
        ],
    )


def _reached(kind: str, alone: Mapping[str, Mapping[str, Any]]) -> Row:
    if DETECTORS[kind].status == "healthy":
        return "no alarm", "-", "-"
    if kind not in alone:
        return "not measured", "-", "-"
    return figures(alone[kind])[: len(ALONE)]


def _healthy(band: Band) -> str:
    if not band.healthy:
        return "not measured"
    return " / ".join(f"{band.healthy[name]:.4g}" for name in QUANTILES)


def _edge(band: Band) -> str:
    plain = f"{band.of(PLAIN):.4g}"
    return f"{plain}, with QK-norm {band.of(QK_NORM):.4g}" if QK_NORM in band.edge else plain
