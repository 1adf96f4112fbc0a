"""Figures of single heads: the layer x head map, a layer's heads over training, a head's singular spectrum."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from .lines import add_lines, curve_traces, limit_per_line
from .series import curve_of
from .style import GREY, NOT_OBSERVED, axis, legend_below, line_style, log_axis, new_figure

MOST_SPECTRA = 400
_LINES_OF_SPECTRA = 9
_HEAD_LEGEND_PX = 90
_STEP_LEGEND_PX = 110
# Below this share of the head's largest singular value a double-precision spectrum is rounding noise.
_SPECTRUM_FLOOR = 1e-12

Pair = tuple[str, int]


@dataclass(frozen=True)
class HeadMetric:
    """A per-head column that can be mapped: where it lies, what it is called, which end is alarming."""

    column: str
    table: str
    title: str
    unit: str
    alarming_is_low: bool

    @property
    def label(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


HEAD_METRICS = (
    HeadMetric("entropy", "attention", "attention entropy", "nats", alarming_is_low=True),
    HeadMetric("entropy_frac", "attention", "entropy / ln(visible keys)", "share", alarming_is_low=True),
    HeadMetric("entropy_min", "attention", "lowest entropy of a row", "nats", alarming_is_low=True),
    HeadMetric("entropy_bound", "attention", "lower bound of the entropy", "nats", alarming_is_low=True),
    HeadMetric("max_logit", "attention", "largest logit", "", alarming_is_low=False),
    HeadMetric("rank_frac", "attention", "rank of the attention map / rows", "share", alarming_is_low=True),
    HeadMetric("sec_1", "spectra", "SEC₁", "share of energy", alarming_is_low=False),
    HeadMetric("sec_4", "spectra", "SEC₄", "share of energy", alarming_is_low=False),
    HeadMetric("sec_10", "spectra", "SEC₁₀", "share of energy", alarming_is_low=False),
    HeadMetric("sigma1", "spectra", "σ₁ of WqᵀWk", "", alarming_is_low=False),
    HeadMetric("frobenius", "spectra", "Frobenius norm of WqᵀWk", "", alarming_is_low=False),
    HeadMetric("stable_rank", "spectra", "stable rank of WqᵀWk", "", alarming_is_low=True),
    HeadMetric("effective_rank", "spectra", "effective rank of WqᵀWk", "", alarming_is_low=True),
)


def layer_order(layers: Sequence[str]) -> list[str]:
    """Layers as the model runs through them: numbers in a path count as numbers (block 2 before block 10)."""
    return sorted(
        dict.fromkeys(layers),
        key=lambda name: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)],
    )


def short_names(layers: Sequence[str]) -> tuple[dict[str, str], str]:
    """What tells the layers apart, and the pattern they share: {"blocks.0.attn": "0", ...}, "blocks.*.attn"."""
    paths = [layer.split(".") for layer in layers]
    least = min(map(len, paths), default=0)
    head = next((i for i in range(least) if len({tuple(p[: i + 1]) for p in paths}) > 1), least)
    tail = next(
        (i for i in range(least - head) if len({tuple(p[len(p) - i - 1 :]) for p in paths}) > 1), least - head
    )
    middles = {
        layer: ".".join(path[head : len(path) - tail]) for layer, path in zip(layers, paths, strict=True)
    }
    if len(layers) < 2 or not all(middles.values()) or head + tail == 0:  # noqa: PLR2004 - one layer: nothing to tell apart
        return {layer: layer for layer in layers}, ""
    return middles, ".".join([*paths[0][:head], "*", *paths[0][len(paths[0]) - tail :]])


def all_heads(sites: Sequence[Mapping[str, Any]], frame: pd.DataFrame) -> list[Pair]:
    """Every (layer, head) of the run: those its manifest names and those its table has."""
    named = [(str(site["name"]), head) for site in sites for head in range(int(site.get("heads") or 0))]
    rows = frame[["layer", "head"]].drop_duplicates()
    seen = [(str(layer), int(head)) for layer, head in zip(rows["layer"], rows["head"], strict=True)]
    return list(dict.fromkeys([*named, *seen]))


def metric_range(values: pd.Series) -> tuple[float, float]:
    """Ends of the colour scale: the whole run's range, so that moving through the steps compares."""
    known = values[np.isfinite(values.astype("float64"))]
    if known.empty:
        return 0.0, 1.0
    low, high = float(known.min()), float(known.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def heat_figure(
    frame: pd.DataFrame,
    pairs: Sequence[Pair],
    metric: HeadMetric,
    *,
    step: int,
    last_step: int | None = None,
    scale: tuple[float, float],
    uirevision: str = "heat",
) -> go.Figure:
    """Layers down, heads across, colour the metric at one step or in a few; what was not observed is crossed out.

    Args:
        frame: columns layer, head and the metric's, one row per head.
        pairs: every (layer, head) of the run; the others of the grid stay empty.
        metric: what is shown.
        step: for the title.
        last_step: likewise, where a value is the most alarming one of several steps.
        scale: ends of the colour scale.
        uirevision: zoom survives a new step as long as this stays the same.
    """
    layers = layer_order([layer for layer, _ in pairs])
    heads = 1 + max((head for _, head in pairs), default=-1)
    values_lh = np.full((len(layers), heads), np.nan)
    row_of = {layer: row for row, layer in enumerate(layers)}
    for layer, head, value in zip(frame["layer"], frame["head"], frame[metric.column], strict=True):
        if np.isfinite(value):
            values_lh[row_of[str(layer)], int(head)] = float(value)
    short, pattern = short_names(layers)
    names = [short[layer] for layer in layers]
    figure = new_figure(
        f"{metric.label} at step {step:,}"
        if last_step is None
        else f"{metric.label} in steps {step:,} to {last_step:,}, the {'lowest' if metric.alarming_is_low else 'highest'}",
        130 + min(620, max(150, 34 * len(layers))),
        uirevision,
        plot_bgcolor="white",
        showlegend=False,
    )
    figure.add_trace(
        go.Heatmap(
            z=values_lh,
            x=[str(head) for head in range(heads)],
            y=names,
            customdata=[[layer] * heads for layer in layers],
            zmin=scale[0],
            zmax=scale[1],
            colorscale="YlOrRd_r" if metric.alarming_is_low else "YlOrRd",
            colorbar={"thickness": 12, "tickformat": ".3~g", "title": {"text": metric.unit}},
            xgap=1,
            ygap=1,
            hoverongaps=False,
            texttemplate="%{z:.3~g}" if heads <= 12 and len(layers) <= 24 else None,  # noqa: PLR2004 - as many as fit
            hovertemplate=f"layer %{{customdata}}<br>head %{{x}}<br>{metric.title} %{{z:.5g}} {metric.unit}<extra></extra>",
        )
    )
    unseen = [(layer, head) for layer, head in pairs if np.isnan(values_lh[row_of[layer], head])]
    figure.add_trace(
        go.Scatter(
            x=[str(head) for _, head in unseen],
            y=[short[layer] for layer, _ in unseen],
            customdata=[layer for layer, _ in unseen],
            mode="markers",
            name="not observed",
            marker={
                "symbol": "x-thin-open",
                "size": 11,
                "color": GREY,
                "line": {"width": 1.5, "color": GREY},
            },
            hovertemplate=f"layer %{{customdata}}<br>head %{{x}}<br>{metric.title}: not observed<extra></extra>",
        )
    )
    figure.layout.xaxis = axis(
        "head", type="category", categoryorder="array", categoryarray=[str(h) for h in range(heads)]
    )
    figure.layout.yaxis = axis(
        f"layer ({pattern})" if pattern else "layer",
        type="category",
        categoryorder="array",
        categoryarray=names,
        autorange="reversed",
    )
    figure.update_layout(plot_bgcolor=NOT_OBSERVED, xaxis={"showgrid": False}, yaxis={"showgrid": False})
    return figure


def head_lines_figure(
    frame: pd.DataFrame, layer: str, metric: HeadMetric, *, uirevision: str = "heads"
) -> go.Figure:
    """The metric of every head of one layer over training, one line per head.

    Args:
        frame: columns step, head and the metric's, rows of this layer only; coarse ones may be (see series.py).
        layer: for the title.
        metric: what is shown.
        uirevision: zoom survives new data as long as this stays the same.
    """
    figure = new_figure(f"{metric.title} of {layer}", 420, uirevision, hovermode="x unified")
    heads = sorted({int(head) for head in frame["head"]})
    limit = limit_per_line(len(heads))
    curves = []
    for number, head in enumerate(heads):
        curve = curve_of(frame[frame["head"] == head], metric.column)
        hover = f"%{{y:.4g}} {metric.unit}"
        curves.append(
            curve_traces(
                curve, f"head {head}", line_style(number), hover, limit=limit, crowded=len(heads) > 1
            )
        )
    add_lines(figure, curves)
    figure.layout.xaxis = axis("step", hoverformat=",d", rangemode="nonnegative")
    figure.layout.yaxis = axis(metric.label)
    legend_below(figure, len(heads), _HEAD_LEGEND_PX)
    return figure


def spectrum_map_figure(
    spectrum: pd.DataFrame, head: str, *, share: bool, uirevision: str = "spectrum"
) -> go.Figure:
    """A head's singular values over training: step across, index down, colour log10.

    Args:
        spectrum: index step, columns 1, 2, ...: singular values, descending, NaN where not observed.
        head: which head, for the title.
        share: show each value's share of the spectral energy, sigma_i^2 / sum sigma^2.
        uirevision: zoom survives new data as long as this stays the same.
    """
    values_ks, steps = _spectrum_values(thinned_spectrum(spectrum), share=share)
    figure = new_figure(f"{_spectrum_title(share=share)} of {head}", 420, uirevision)
    figure.add_trace(
        go.Heatmap(
            z=_log10(values_ks),
            x=steps,
            y=list(spectrum.columns),
            customdata=values_ks,
            colorscale="Viridis",
            colorbar={"thickness": 12, "title": {"text": "log₁₀"}},
            hoverongaps=False,
            hovertemplate="step %{x:,d}<br>index %{y}<br>%{customdata:.4g}<extra></extra>",
        )
    )
    figure.layout.xaxis = axis("step")
    figure.layout.yaxis = axis(
        "index (1: largest)", autorange="reversed", tick0=1, dtick=max(1, spectrum.shape[1] // 8)
    )
    figure.update_layout(plot_bgcolor=NOT_OBSERVED, xaxis={"showgrid": False}, yaxis={"showgrid": False})
    return figure


def spectrum_lines_figure(
    spectrum: pd.DataFrame, head: str, *, share: bool, uirevision: str = "spectrum-lines"
) -> go.Figure:
    """A head's singular values against their index, one line per chosen step, dark early to bright late.

    Args: as of `spectrum_map_figure`.
    """
    known = spectrum.dropna(how="all")
    picks = np.unique(np.linspace(0, len(known) - 1, min(_LINES_OF_SPECTRA, len(known))).round().astype(int))
    values_ks, steps = _spectrum_values(known.iloc[picks], share=share)
    figure = new_figure(f"{_spectrum_title(share=share)} of {head}", 420, uirevision)
    colours = sample_colorscale("Viridis", list(np.linspace(0.0, 0.9, max(2, len(picks)))))
    for number, step in enumerate(steps):
        figure.add_trace(
            go.Scatter(
                x=list(spectrum.columns),
                y=values_ks[:, number],
                name=f"step {step:,}",
                mode="lines+markers",
                line={"color": colours[number], "width": 1.8},
                marker={"size": 4},
                hovertemplate="index %{x}: %{y:.4g}",
            )
        )
    figure.layout.xaxis = axis("index (1: largest)")
    figure.layout.yaxis = log_axis("share of energy" if share else "singular value")
    legend_below(figure, len(steps), _STEP_LEGEND_PX)
    return figure


def thinned_spectrum(spectrum: pd.DataFrame, limit: int = MOST_SPECTRA) -> pd.DataFrame:
    """At most `limit` steps: of each bucket the step with the largest singular value, so that a spike stays."""
    if len(spectrum) <= limit:
        return spectrum
    bucket_n = np.arange(len(spectrum)) * limit // len(spectrum)
    largest = pd.Series(spectrum[1].fillna(-np.inf).to_numpy())
    return spectrum.iloc[largest.groupby(bucket_n).idxmax().to_numpy()]


def _spectrum_values(spectrum: pd.DataFrame, *, share: bool) -> tuple[np.ndarray[Any, Any], list[int]]:
    sigma_sk = spectrum.to_numpy(dtype=np.float64)
    if share:
        energy_s1 = np.nansum(sigma_sk**2, axis=1, keepdims=True)
        sigma_sk = np.divide(sigma_sk**2, energy_s1, out=np.full_like(sigma_sk, np.nan), where=energy_s1 > 0)
    return sigma_sk.T, [int(step) for step in spectrum.index]


def _log10(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    known = values[np.isfinite(values)]
    top = known.max() if known.size and known.max() > 0 else 1.0
    # An exact zero has no logarithm; it is drawn at the floor and its hover text still says 0.
    logs: np.ndarray[Any, Any] = np.log10(np.maximum(values, top * _SPECTRUM_FLOOR))
    return logs


def _spectrum_title(*, share: bool) -> str:
    return "share of spectral energy" if share else "singular values of WqᵀWk"
