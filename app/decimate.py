"""Fewer points for the same picture: per bucket the lowest and highest value stay, so a one-step spike is seen."""

import numpy as np
import pandas as pd

MOST_POINTS = 5000


def decimate(curve: pd.DataFrame, limit: int = MOST_POINTS) -> pd.DataFrame:
    """At most `limit` rows of a curve; the same rows for the same curve.

    Rows are cut into equal buckets by position. Each bucket keeps its lowest and its highest `value`
    and, if it has a gap, its first NaN; the curve keeps its first and last row. Averaging or striding
    would hide exactly what this dashboard is for: the one step that jumps.

    Args:
        curve: columns `step` (ascending) and `value`, and any others, which travel along.
        limit: most rows wanted, 5 or more.
    """
    assert limit >= 5, limit  # noqa: PLR2004 - first, last and one bucket of three; callers pass constants
    count = len(curve)
    if count <= limit:
        return curve
    buckets = (limit - 2) // 3
    bucket_n = np.arange(count) * buckets // count
    values = pd.Series(curve["value"].to_numpy(dtype=np.float64))
    known = values.notna()
    by_bucket = values[known].groupby(bucket_n[known])
    gaps = pd.Series(np.flatnonzero(~known)).groupby(bucket_n[~known]).min()
    kept = np.unique(
        np.concatenate([by_bucket.idxmin(), by_bucket.idxmax(), gaps, [0, count - 1]]).astype(np.int64)
    )
    return curve.iloc[kept]


def with_gaps(curve: pd.DataFrame) -> pd.DataFrame:
    """The curve with a NaN row wherever steps are missing, so that no line is drawn across what was not seen.

    Steps count as missing where the distance to the next row is more than 1.5 times both neighbouring
    distances: a schedule may change its stride on the way, which is no gap.
    """
    steps = curve["step"].to_numpy(dtype=np.int64)
    if len(steps) < 3:  # noqa: PLR2004 - two rows have one distance, and nothing to compare it with
        return curve
    strides = np.diff(steps)
    before = np.concatenate([[0], strides[:-1]])
    after = np.concatenate([strides[1:], [0]])
    holes = np.flatnonzero(strides > 1.5 * np.maximum(before, after))
    if not len(holes):
        return curve
    between = pd.DataFrame({"step": (steps[holes] + steps[holes + 1]) // 2, "value": np.nan})
    joined = pd.concat([curve, between.reindex(columns=curve.columns)], ignore_index=True)
    return joined.sort_values("step", kind="stable", ignore_index=True)
