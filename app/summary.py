"""A run's tables in, one curve per quantity out: what the step charts and the run list show. Pandas only.

The tables may be coarse ones (see series.py). Then a curve's value is a mean over a bucket of steps, and its low and
high enclose every step's value, so that a spike of one step is seen.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from diagnostics.store.manifest import attempts_of

from .series import HIGH, LOW, Span, curve_of, finite, is_coarse, spliced

DRAWN_KINDS = ("alert", "control")
_REMEDY_KINDS = ("control", "remedy")
_REFUSED = ("rejected", "expired")

# A curve is a DataFrame with columns step (ascending), value (NaN: not observed), of coarse rows low and high, and,
# where a head or parameter was picked out, where.
Curve = pd.DataFrame


def empty_curve() -> Curve:
    return pd.DataFrame({"step": pd.Series(dtype="int64"), "value": pd.Series(dtype="float64")})


@dataclass(frozen=True)
class NotFinite:
    """Consecutive steps, inclusive, whose loss was handed in but was no finite number."""

    first_step: int
    last_step: int
    shown: str


@dataclass(frozen=True)
class RunCurves:
    """What one run looks like over its steps.

    Attributes:
        loss: every step's loss.
        loss_not_finite: where the loss was NaN or infinite.
        entropy: lowest attention entropy of any head, nats.
        sec_mean, sec_max: mean and largest sec_1 over heads.
        logit: largest scaled logit of any head.
        ratio: largest sigma1(dW) / sigma1(W) of any parameter.
        bound_fired: whether a bound held back any update.
        resolution: steps that a point stands for at most; 1 where every point is a step.
    """

    loss: Curve = field(default_factory=empty_curve)
    loss_not_finite: tuple[NotFinite, ...] = ()
    entropy: Curve = field(default_factory=empty_curve)
    sec_mean: Curve = field(default_factory=empty_curve)
    sec_max: Curve = field(default_factory=empty_curve)
    logit: Curve = field(default_factory=empty_curve)
    ratio: Curve = field(default_factory=empty_curve)
    bound_fired: bool = False
    resolution: int = 1

    def with_detail(self, detail: "RunCurves", span: Span) -> "RunCurves":
        """These curves with those of `detail` in a range of steps."""
        return replace(
            self,
            loss=spliced(self.loss, detail.loss, span),
            entropy=spliced(self.entropy, detail.entropy, span),
            sec_mean=spliced(self.sec_mean, detail.sec_mean, span),
            sec_max=spliced(self.sec_max, detail.sec_max, span),
            logit=spliced(self.logit, detail.logit, span),
            ratio=spliced(self.ratio, detail.ratio, span),
        )


@dataclass(frozen=True)
class Mark:
    """An event that is drawn as a vertical line."""

    step: int
    kind: str
    severity: str
    text: str


@dataclass(frozen=True)
class TauSpan:
    """Steps, inclusive, during which the spectral bound was armed with `tau`; last_step None: to the end."""

    first_step: int
    last_step: int | None
    tau: float


def run_curves(
    steps: pd.DataFrame,
    attention: pd.DataFrame,
    spectra: pd.DataFrame,
    updates: pd.DataFrame,
    *,
    resolutions: Sequence[int] = (1, 1, 1, 1),
) -> RunCurves:
    """Per-step summary of a run, from rows as recorded or from coarse ones.

    Args:
        steps: columns step, loss, loss_not_finite (bool: handed in, but NaN or infinite).
        attention: columns step, layer, head, entropy, max_logit.
        spectra: columns step, layer, head, sec_1.
        updates: columns step, parameter, ratio, scale.
        resolutions: steps that a row of each table stands for; 1: as recorded.
    """
    return RunCurves(
        loss=curve_of(steps, "loss"),
        loss_not_finite=_not_finite_runs(steps, resolutions[0]),
        entropy=_extreme(attention, "entropy", ("layer", "head"), largest=False),
        sec_mean=_mean(spectra, "sec_1"),
        sec_max=_extreme(spectra, "sec_1", ("layer", "head"), largest=True),
        logit=_extreme(attention, "max_logit", ("layer", "head"), largest=True),
        ratio=_extreme(updates, "ratio", ("parameter",), largest=True),
        bound_fired=bool((updates["scale" + LOW if is_coarse(updates, "scale") else "scale"] < 1).any()),
        resolution=max(resolutions),
    )


def last_value(curve: Curve) -> float | None:
    known = curve["value"].dropna()
    return None if known.empty else float(known.iloc[-1])


def lowest(curve: Curve) -> float | None:
    known = curve["low" if "low" in curve else "value"].dropna()
    return None if known.empty else float(known.min())


def highest(curve: Curve) -> float | None:
    known = curve["high" if "high" in curve else "value"].dropna()
    return None if known.empty else float(known.max())


def smoothed(curve: Curve, span: int) -> Curve:
    """Trailing exponential mean over about `span` rows (it sees no later step); gaps stay gaps."""
    mean = curve["value"].ewm(span=span, ignore_na=True).mean().where(curve["value"].notna())
    return pd.DataFrame({"step": curve["step"], "value": mean})


def marks_of(events: pd.DataFrame) -> tuple[Mark, ...]:
    """Alerts and control commands, in step order."""
    drawn = events[events["kind"].isin(DRAWN_KINDS)]
    return tuple(
        Mark(int(row["step"]), str(row["kind"]), str(row["severity"] or "info"), _event_text(row))
        for row in drawn.to_dict("records")
    )


def resumes(info: Mapping[str, Any]) -> tuple[Mark, ...]:
    """Where later attempts at the run went on, as run.json tells; one that has closed no step yet is left out."""
    marks = []
    before: Mapping[str, Any] = {}
    for entry in attempts_of(dict(info)):
        number, step = entry.get("attempt"), entry.get("first_step")
        if isinstance(number, int) and number > 1 and isinstance(step, int):
            was = f" (attempt {before['attempt']}: {before.get('state')})" if "attempt" in before else ""
            marks.append(Mark(step, "attempt", "info", f"attempt {number} resumed at step {step:,}{was}"))
        before = entry
    return tuple(marks)


def tau_spans(events: pd.DataFrame, info: Mapping[str, Any]) -> tuple[TauSpan, ...]:
    """When the spectral bound was armed, and with which tau, as far as the run says so.

    One armed in code stands in the manifest's `remedies`, with the first measured step that met it armed; one armed
    by a command in events of kind `control` or `remedy` whose data holds `tau`, and in `remedies` besides. A
    refused command arms nothing.
    """
    changes: list[tuple[int, float | None]] = []
    for row in events[events["kind"].isin(_REMEDY_KINDS)].to_dict("records"):
        data = event_data(row["data"])
        if data.get("status") in _REFUSED:
            continue
        if data.get("command") == "disarm":
            changes.append((int(row["step"]), None))
        elif (tau := _find_tau(data)) is not None:
            changes.append((int(row["step"]), tau))
    commanded = list(changes)
    for met, tau in _armed(info):
        # Older recorders did not tell when: then the command that armed it does, where there is one.
        if not any(by == tau and (met is None or step <= met) for step, by in commanded):
            changes.append((met or 0, tau))
    changes.sort(key=lambda change: change[0])
    spans = []
    ends = [step for step, _ in changes[1:]]
    for number, (first, tau) in enumerate(changes):
        # An infinite tau observes without bounding: there is no line to draw.
        if tau is not None and math.isfinite(tau):
            spans.append(TauSpan(first, ends[number] if number < len(ends) else None, tau))
    return tuple(spans)


def event_data(text: object) -> dict[str, Any]:
    """The `data` column of one event; {} where it is null or no JSON object."""
    if not isinstance(text, str):
        return {}
    try:
        data = json.loads(text)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def place(layer: object, head: object) -> str:
    """`blocks.0.attn head 3`, with what is known."""
    words = [layer] if isinstance(layer, str) and layer else []
    return " ".join([*words, f"head {head}"] if isinstance(head, (int, np.integer)) else words)


def _extreme(frame: pd.DataFrame, column: str, keys: tuple[str, ...], *, largest: bool) -> Curve:
    if is_coarse(frame, column):
        return _extreme_of_buckets(frame, column, keys, largest=largest)
    rows = pd.DataFrame({"step": frame["step"], "value": finite(frame[column])}).reset_index(drop=True)
    grouped = rows.dropna(subset="value").groupby("step")["value"]
    picked = rows.loc[(grouped.idxmax() if largest else grouped.idxmin()).to_numpy(dtype=np.int64)]
    where = _places(frame.iloc[picked.index.to_numpy()], keys)
    picked = picked.assign(where=pd.Series(where, index=picked.index, dtype=object))
    every_step = pd.DataFrame({"step": np.unique(rows["step"].to_numpy(dtype=np.int64))})
    return every_step.merge(picked, on="step", how="left")


def _extreme_of_buckets(frame: pd.DataFrame, column: str, keys: tuple[str, ...], *, largest: bool) -> Curve:
    """The curve of the outermost head, of which coarse rows know bounds.

    At each step of a bucket the lowest of all heads is no lower than the lowest minimum, and no higher than the
    lowest maximum; so is, mirrored, the highest. The value is the outermost mean.
    """
    step_n = frame["step"].to_numpy(dtype=np.int64)
    if not len(step_n):
        empty = pd.Series(dtype="float64")
        return pd.DataFrame({"step": step_n, "value": empty, "low": empty, "high": empty})
    edges = np.flatnonzero(np.concatenate([[True], np.diff(step_n) > 0]))
    outermost = np.fmax if largest else np.fmin
    bounds = {
        name: outermost.reduceat(finite(frame[column + suffix]).to_numpy(), edges)
        for name, suffix in (("value", ""), ("low", LOW), ("high", HIGH))
    }
    # The head that is named is the one that went furthest.
    furthest_n = finite(frame[column + (HIGH if largest else LOW)]).to_numpy()
    bound_n = np.repeat(bounds["high" if largest else "low"], np.diff(np.concatenate([edges, [len(step_n)]])))
    at = np.flatnonzero(furthest_n == bound_n)
    known, first = np.unique(step_n[at], return_index=True)
    where = pd.Series(index=step_n[edges], dtype=object)
    where.loc[known] = _places(frame.iloc[at[first]], keys)
    return pd.DataFrame({"step": step_n[edges], **bounds, "where": where.to_numpy()})


def _places(rows: pd.DataFrame, keys: tuple[str, ...]) -> list[str]:
    if keys == ("layer", "head"):
        return [place(layer, head) for layer, head in zip(rows["layer"], rows["head"], strict=True)]
    return [str(value) for value in rows[keys[0]]]


def _mean(frame: pd.DataFrame, column: str) -> Curve:
    rows = pd.DataFrame({"step": frame["step"].astype("int64"), "value": finite(frame[column])})
    return rows.groupby("step", sort=True)["value"].mean().reset_index()


def _not_finite_runs(steps: pd.DataFrame, resolution: int) -> tuple[NotFinite, ...]:
    bad = steps["loss_not_finite"].to_numpy(dtype=bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], bad, [False]]).astype(np.int8)))
    at = steps["step"].to_numpy(dtype=np.int64)
    losses = steps["loss"].to_numpy(dtype=np.float64)
    return tuple(
        NotFinite(int(at[first]), int(at[end - 1]) + resolution - 1, _not_finite(losses[first], resolution))
        for first, end in zip(edges[::2], edges[1::2], strict=True)
    )


def _not_finite(loss: float, resolution: int) -> str:
    if resolution > 1:
        return "not finite"
    return "NaN" if np.isnan(loss) else "infinite"


def _event_text(row: Mapping[Any, Any]) -> str:
    message = str(row["message"]) if isinstance(row["message"], str) else str(row["kind"])
    head = None if pd.isna(row["head"]) else int(row["head"])
    where = place(row["layer"], head)
    return f"{message} ({where})" if where and where not in message else message


def _armed(info: Mapping[str, Any]) -> Iterator[tuple[int | None, float]]:
    remedies = info.get("remedies") or ()
    for remedy in remedies.values() if isinstance(remedies, Mapping) else remedies:
        if isinstance(remedy, Mapping) and (tau := number_of(remedy.get("tau"))) is not None:
            step = remedy.get("step")
            yield (step if isinstance(step, int) else None), tau


def _find_tau(data: Mapping[str, Any]) -> float | None:
    for place_of_tau in (data, data.get("after"), data.get("arguments")):
        if isinstance(place_of_tau, Mapping) and (tau := number_of(place_of_tau.get("tau"))) is not None:
            return tau
    return None


def number_of(value: object) -> float | None:
    """A number out of JSON, which has no NaN and no infinity: those are the strings that float() reads back."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except ValueError:
        return None
