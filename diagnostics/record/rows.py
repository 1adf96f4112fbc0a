"""Measured tensors as table rows. Fetching from a device happens here, on the worker's thread."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from diagnostics.measure.attention import RowStatistics
from diagnostics.measure.spectra import HeadSpectra
from diagnostics.record.measured_step import MeasuredStep
from diagnostics.record.update_sizes import GroupUpdates

Row = dict[str, Any]


def attention_rows(step: int, measured: MeasuredStep) -> list[Row]:
    return [
        {"step": step, "layer": layer, "head": head, **values}
        for layer, calls in measured.attention.items()
        for head, values in enumerate(_combined(calls))
    ]


def spectra_rows(step: int, measured: MeasuredStep) -> list[Row]:
    return [
        {"step": step, "layer": layer, "head": head, **values}
        for layer, spectra in measured.spectra.items()
        for head, values in enumerate(_spectra(spectra))
    ]


def update_rows(step: int, measured: MeasuredStep) -> list[Row]:
    return [{"step": step, **row} for group in measured.updates for row in _updates(group)]


def _combined(calls: Sequence[RowStatistics]) -> list[Row]:
    """One row per head over all calls of a site: means weighted by rows, extremes over all."""
    rows_ch = torch.stack([call.rows_h for call in calls]).cpu().double()

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([getattr(call, name) for call in calls]).cpu().double()

    def mean(name: str) -> list[float]:
        values_ch = stacked(name)
        weights_ch = torch.where(values_ch.isnan(), 0.0, rows_ch)
        total_h = (values_ch.nan_to_num() * weights_ch).sum(0) / weights_ch.sum(0)
        return [float(value) for value in total_h]

    def extreme(name: str, *, largest: bool) -> list[float]:
        values_ch = stacked(name)
        fill = -math.inf if largest else math.inf
        filled_ch = values_ch.masked_fill(values_ch.isnan(), fill)
        best_h = filled_ch.amax(0) if largest else filled_ch.amin(0)
        return [
            float(v) for v in torch.where(values_ch.isnan().all(0), torch.full_like(best_h, math.nan), best_h)
        ]

    columns = {
        "entropy": mean("entropy_h"),
        "entropy_min": extreme("entropy_min_h", largest=False),
        "entropy_frac": mean("entropy_frac_h"),
        "entropy_bound": extreme("entropy_bound_h", largest=False),
        "max_logit": extreme("max_logit_h", largest=True),
        "rank_frac": mean("rank_frac_h"),
    }
    heads = rows_ch.shape[1]
    return [
        {
            **{name: null_if_nan(values[head]) for name, values in columns.items()},
            "rows": int(rows_ch[:, head].sum()),
        }
        for head in range(heads)
    ]


def _spectra(spectra: HeadSpectra) -> list[Row]:
    names = ("sigma1", "frobenius", "sec_1", "sec_4", "sec_10", "stable_rank", "effective_rank")
    columns = {name: getattr(spectra, f"{name}_h").tolist() for name in names}
    values_hk = spectra.singular_values_hk.tolist()
    return [
        {
            **{name: null_if_nan(column[head]) for name, column in columns.items()},
            "singular_values": None if any(map(math.isnan, values)) else values,
        }
        for head, values in enumerate(values_hk)
    ]


def _updates(group: GroupUpdates) -> list[Row]:
    sigma1, update, frobenius, scale = (
        values.double().tolist()
        for values in (group.sigma1_n, group.update_sigma1_n, group.frobenius_ratio_n, group.scale_n)
    )
    return [
        {
            "parameter": parameter,
            "sigma1": null_if_nan(sigma1[index]),
            "update_sigma1": null_if_nan(update[index]),
            # A ratio to nothing is not a number: a zero-initialised matrix has none before its first step.
            "ratio": null_if_nan(update[index] / sigma1[index]) if sigma1[index] > 0.0 else None,
            "frobenius_ratio": null_if_nan(frobenius[index]) if sigma1[index] > 0.0 else None,
            "scale": null_if_nan(scale[index]),
        }
        for index, parameter in enumerate(group.parameters)
    ]


def null_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value
