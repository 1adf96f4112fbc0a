"""What a chart is drawn from: rows as recorded, or, of many steps, mean, lowest and highest over so many. Pandas only.

In a frame of coarse rows `<metric>` is the mean over a bucket of steps, `<metric>_low` and `<metric>_high` are its
lowest and highest value, and `step` is the bucket's first. A frame of rows as recorded has neither of the two.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

# Rows that are read and drawn from at once: a second's work, whatever they are made of.
ROWS_AT_ONCE = 600_000
# Of a table with one row a step: the next coarser one is 16 times shorter, and should still fill a wide window.
_MOST_STEPS = 16_000
_FEWEST_STEPS = 1000
# Matrices per attention site whose updates are recorded, roughly: projections, MLP and norms.
_MATRICES_PER_SITE = 6

LOW, HIGH = "_low", "_high"
Span = tuple[int, int]


def most_steps(table: str, info: Mapping[str, Any], *, layer: str | None = None) -> int:
    """How many steps, or buckets of steps, of a table are read for one picture.

    Args:
        table: its name.
        info: the manifest, which says how many rows a measured step has.
        layer: only the heads of this layer are read.
    """
    if table in ("steps", "events"):
        return _MOST_STEPS
    told = info.get("sites")
    sites = [site for site in (told if isinstance(told, list) else []) if isinstance(site, Mapping)]
    if table == "updates":
        rows = max(1, _MATRICES_PER_SITE * len(sites))
    else:
        rows = sum(int(site.get("heads") or 0) for site in sites if layer in (None, site.get("name")))
    return max(_FEWEST_STEPS, min(_MOST_STEPS, ROWS_AT_ONCE // max(1, rows)))


def coarse_columns(metrics: Sequence[str]) -> list[str]:
    """The columns of a coarse table that a picture of these metrics needs, besides the keys."""
    return [f"{metric}_{what}" for metric in metrics for what in ("mean", "min", "max")]


def as_series(frame: pd.DataFrame, metrics: Sequence[str]) -> pd.DataFrame:
    """A coarse table's columns under the names that a picture uses."""
    names = {f"{metric}_mean": metric for metric in metrics}
    names |= {f"{metric}_min": metric + LOW for metric in metrics}
    names |= {f"{metric}_max": metric + HIGH for metric in metrics}
    return frame.rename(columns=names)


def is_coarse(frame: pd.DataFrame, metric: str) -> bool:
    return metric + LOW in frame


def finite(values: pd.Series) -> pd.Series:
    """float64, NaN for all that is no finite number."""
    return values.astype("float64").where(np.isfinite(values.astype("float64")))


def curve_of(rows: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One series as a curve: step and value, and with coarse rows low and high.

    Args:
        rows: of one head, parameter or scalar only, in step order.
        metric: the column.
    """
    columns = {"step": rows["step"], "value": finite(rows[metric])}
    if is_coarse(rows, metric):
        columns |= {"low": finite(rows[metric + LOW]), "high": finite(rows[metric + HIGH])}
    return pd.DataFrame(columns)


def spliced(whole: pd.DataFrame, part: pd.DataFrame, span: Span) -> pd.DataFrame:
    """`whole` with its rows of a range of steps replaced by those of `part`, which has more of them.

    Args:
        whole: curve or frame of the whole run.
        part: the same of `span` only; its rows may be as recorded where those of `whole` are coarse.
        span: first and last step, at the edges of `whole`'s buckets.
    """
    first, last = span
    part = part[(part["step"] >= first) & (part["step"] <= last)]
    if part.empty:
        return whole
    for column in whole.columns:
        if column not in part and column.removesuffix(LOW).removesuffix(HIGH) in part:
            part = part.assign(**{column: part[column.removesuffix(LOW).removesuffix(HIGH)]})
        elif column in ("low", "high") and column not in part:
            part = part.assign(**{column: part["value"]})
    before, after = whole[whole["step"] < first], whole[whole["step"] > last]
    pieces = [piece for piece in (before, part, after) if len(piece)]
    return pd.concat(pieces, ignore_index=True)


def whole_buckets(span: Span, resolution: int) -> Span:
    """The range of steps, widened to whole buckets."""
    first, last = span
    return max(0, first) // resolution * resolution, (max(0, last) // resolution + 1) * resolution - 1


def shortened(curve: pd.DataFrame, limit: int) -> pd.DataFrame:
    """A curve with low and high of at most `limit` rows: neighbours become one, and no spike is lost.

    Args:
        curve: columns step, value, low, high, and any others, of which the first of each group stays.
        limit: most rows wanted.
    """
    if len(curve) <= limit:
        return curve
    group_n = np.arange(len(curve)) * limit // len(curve)
    grouped = curve.groupby(group_n)
    kept = grouped.first()
    kept["step"] = grouped["step"].first()
    kept["value"] = grouped["value"].mean()
    kept["low"] = grouped["low"].min()
    kept["high"] = grouped["high"].max()
    return kept[list(curve.columns)]
