"""Cached reads for the pages: what was read stays until the run says that there is more. No streamlit here.

A page that follows a live run is drawn every two seconds. Reading whole histories each time is what makes other
trackers' pages slow. A short run is therefore read once and then followed by a cursor; of a long one coarse rows
are read, mean and extremes over so many steps, and single steps only of the range or the head that is looked at.
"""

import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from diagnostics.report import Report, assess
from diagnostics.store.coarse.tables import KEYS
from diagnostics.store.format import RESOLUTIONS, TABLES
from diagnostics.store.read import Run, open_run

from .following import Following, as_frame, birth
from .keeping import Keeper, Kept, Same
from .series import Span, as_series, coarse_columns, most_steps, whole_buckets
from .summary import NotFinite, RunCurves, run_curves

RunPath = str | os.PathLike[str]
Stamp = tuple[Any, ...]

_CURVE_METRICS = {
    "steps": ("loss",),
    "attention": ("entropy", "max_logit"),
    "spectra": ("sec_1",),
    "updates": ("ratio", "scale"),
}
_REPLAY_SHARE = 20.0
ROUGH_POINTS = 500
"""Points of the first picture of a long run: read in a tenth of a second, while a finer one is made."""


class Reader:
    """Reads runs and keeps the latest state of each; values handed out are shared and must not be changed."""

    def __init__(self, most_kept: int = 128) -> None:
        self._kept = Keeper(most_kept)
        self._following = Following(most_kept)
        # One read at a time: sessions share what is kept, and two would read the same files twice.
        self._lock = threading.RLock()
        self._damaged: dict[str, dict[str, str]] = {}

    def info(self, run: RunPath) -> dict[str, Any]:
        """The manifest, with the judged state; small, so always read anew."""
        return open_run(run).info

    def damaged(self, run: RunPath) -> dict[str, str]:
        """Files of the run that could not be read so far, and why."""
        return dict(self._damaged.get(os.fspath(run), {}))

    def table(self, run: RunPath, name: str) -> pd.DataFrame:
        """A table as recorded, without `singular_values`; for a table of a long run see `series`.

        `steps` has `loss_not_finite` besides: NaN apart from null.
        """
        opened = open_run(run)
        with self._lock:
            frame, knows_damage = self._following.table(opened, opened.info, name)
            self._note_damage(knows_damage)
            return frame

    def series(
        self,
        run: RunPath,
        name: str,
        metrics: Sequence[str],
        *,
        span: Span | None = None,
        layer: str | None = None,
        most: int | None = None,
        closed: bool = False,
    ) -> tuple[pd.DataFrame, int]:
        """Some columns of a table, as finely as a picture can show them.

        Args:
            run: the run.
            name: of the table.
            metrics: the columns, besides step and keys.
            span: first and last step; None: the whole run.
            layer: only the heads of this layer.
            most: most steps or buckets of steps wanted; None: what is read within a second.
            closed: leave out a last bucket whose steps are not all there: it is stored nowhere, and making it
                of single steps may take longer than reading all the others.

        Returns:
            Rows as series.py describes them, in step order, and how many steps one stands for (1: as recorded).
        """
        opened = open_run(run)
        info = opened.info
        points = most or most_steps(name, info, layer=layer)
        resolution = self._resolution(opened, info, name, points, span)
        if closed and resolution is not None and span is None:
            end = int(info.get("steps") or 0) // resolution * resolution
            span = (0, end - 1) if end else None
        key = (os.fspath(run), "series", name, tuple(metrics), layer, resolution, span)
        with self._lock:
            if resolution is None and span is None:
                rows = self.table(run, name)
                return (rows if layer is None else rows[rows["layer"] == layer]), 1

            def read() -> pd.DataFrame:
                if resolution is None:
                    assert span is not None
                    return self._range(opened, name, metrics, span, layer)
                return self._coarse(opened, name, metrics, resolution, span, layer, self._kept.last(key))

            return self._kept.get(key, _stamp(info), read), resolution or 1

    def curves(self, run: RunPath, span: Span | None = None, *, most: int | None = None) -> RunCurves:
        """The per-step summary of a run.

        Args:
            run: the run.
            span: a range of steps of which to show more, where there is more than the whole run's picture has.
            most: most points wanted, without the last few steps; None: what a wide window can show.
        """
        with self._lock:
            whole = self._curves(run, None, most)
            if span is None or whole.resolution == 1:
                return whole
            span = whole_buckets(span, whole.resolution)
            return whole.with_detail(self._curves(run, span, most), span)

    def resolution(self, run: RunPath, name: str) -> int:
        """How many steps a row of a table stands for in a picture of the whole run; 1: one."""
        opened = open_run(run)
        info = opened.info
        return self._resolution(opened, info, name, most_steps(name, info), None) or 1

    def refinable(self, run: RunPath) -> bool:
        """Whether the run's picture has more points than a rough one, and they are not read yet."""
        opened = open_run(run)
        info = opened.info
        finer = any(
            self._resolution(opened, info, name, ROUGH_POINTS, None)
            != self._resolution(opened, info, name, most_steps(name, info), None)
            for name in _CURVE_METRICS
        )
        return finer and (os.fspath(run), "curves", None, None) not in self._kept

    def refine(self, run: RunPath) -> None:
        """Reads what the finer picture of a run needs; meanwhile others can use this reader."""
        scratch = Reader()
        scratch.curves(run)
        with self._lock:
            self._kept.adopt(scratch._kept)
            self._following.adopt(scratch._following)

    def report(self, run: RunPath) -> Report:
        """The verdict; on a live run at most 1/20 of the time goes into judging, so it may lag: see `.step`."""
        key = (os.fspath(run), "report")
        with self._lock:
            kept = self._kept.last(key)
            if kept is not None and time.monotonic() - kept.at_s < _REPLAY_SHARE * kept.cost_s:
                return kept.value  # type: ignore[no-any-return]
            seen = Same(self.table(run, name) for name in TABLES)
            return self._kept.get(key, seen, lambda: assess(run))

    def scalars(self, run: RunPath) -> list[str]:
        """The columns of `steps` besides step and time that hold a number."""
        opened = open_run(run)
        info = opened.info
        resolution = self._resolution(opened, info, "steps", most_steps("steps", info), None)
        if resolution is None:
            steps = self.table(run, "steps")
            known = ("step", "time_s", "measured", "overhead_s", "loss_not_finite")
            return [name for name in steps.columns if name not in known and steps[name].notna().any()]
        with self._lock:
            coarse = self._kept.get(
                (os.fspath(run), "scalars"),
                _stamp(info),
                lambda: opened.coarse("steps", RESOLUTIONS[-1]),
            )
        counted = [name.removesuffix("_count") for name in coarse.columns if name.endswith("_count")]
        return [
            name for name in counted if name not in ("time_s", "overhead_s") and coarse[f"{name}_count"].any()
        ]

    def overhead(self, run: RunPath) -> tuple[float, float] | None:
        """The recorder's seconds, and the wall time in which it spent them; None where that is not known yet."""
        steps, resolution = self.series(run, "steps", ("time_s", "overhead_s"))
        if len(steps) < 2 or steps["overhead_s"].isna().all():  # noqa: PLR2004 - a duration needs two times
            return None
        if resolution > 1:
            # Every step has an overhead, so a mean stands for as many steps as its bucket has.
            last = steps["step"].iloc[-1]
            steps_n = np.full(len(steps), resolution)
            steps_n[-1] = max(1, int(open_run(run).info.get("steps") or last + resolution) - last)
            wall_s = float(steps["time_s_high"].iloc[-1] - steps["time_s_low"].iloc[0])
            return float((steps["overhead_s"] * steps_n).sum()), wall_s
        # The first step's overhead lies before its time: it is left out of both.
        wall_s = float(steps["time_s"].iloc[-1] - steps["time_s"].iloc[0])
        return float(steps["overhead_s"].iloc[1:].sum()), wall_s

    def spectrum(self, run: RunPath, layer: str, head: int) -> pd.DataFrame:
        """Singular values of one head: index step, columns 1, 2, ... (descending); NaN where not observed."""
        opened = open_run(run)
        with self._lock:
            return self._kept.get(
                (os.fspath(run), "spectrum", layer, head),
                _stamp(opened.info),
                lambda: self._read_spectrum(opened, layer, head),
            )

    def _curves(self, run: RunPath, span: Span | None, most: int | None) -> RunCurves:
        read = [
            self.series(run, name, metrics, span=span, most=most, closed=most is not None)
            for name, metrics in _CURVE_METRICS.items()
        ]
        frames = [rows for rows, _ in read]
        resolutions = [resolution for _, resolution in read]

        def compute() -> RunCurves:
            curves = run_curves(*frames, resolutions=resolutions)
            if not curves.loss_not_finite or resolutions[0] == 1:
                return curves
            return replace(curves, loss_not_finite=self._first_not_finite(run, curves.loss_not_finite))

        return self._kept.get((os.fspath(run), "curves", span, most), Same(frames), compute)

    def _first_not_finite(self, run: RunPath, spans: tuple[NotFinite, ...]) -> tuple[NotFinite, ...]:
        """The same, the first with the very step at which the loss went, which is what a person looks for."""
        rough = spans[0]
        opened = open_run(run)
        steps = as_frame("steps", opened.table("steps", ["step", "loss"], rough.first_step, rough.last_step))
        bad = steps[steps["loss_not_finite"]]
        if bad.empty:
            return spans
        shown = "NaN" if np.isnan(bad["loss"].iloc[0]) else "infinite"
        exact = NotFinite(int(bad["step"].iloc[0]), int(bad["step"].iloc[-1]), shown)
        return (exact, *spans[1:])

    def _resolution(
        self, run: Run, info: Mapping[str, Any], name: str, points: int, span: Span | None
    ) -> int | None:
        if span is not None:
            # As many in the range as else in the whole run.
            steps = int(info.get("steps") or 0)
            points = int(points * max(1.0, steps / (span[1] - span[0] + 1)))
        key = (str(run.path), "resolution", name, points)
        with self._lock:
            return self._kept.get(key, _stamp(info), lambda: run.resolution_for(points, name))

    def _range(
        self, run: Run, name: str, metrics: Sequence[str], span: Span, layer: str | None
    ) -> pd.DataFrame:
        columns = ["step", *KEYS[name], *metrics]
        rows = run.table(name, columns, *span, **_of_layer(layer))
        self._note_damage(run)
        return as_frame(name, rows)

    def _coarse(
        self,
        run: Run,
        name: str,
        metrics: Sequence[str],
        resolution: int,
        span: Span | None,
        layer: str | None,
        kept: Kept | None,
    ) -> pd.DataFrame:
        columns = ["step", *KEYS[name], *coarse_columns(metrics)]
        if "loss" in metrics:
            columns.append("loss_nonfinite")
        before: pd.DataFrame | None = None
        first, last = span or (None, None)
        if (
            span is None
            and kept is not None
            and _rows_of(kept.stamp) == _rows_of(_stamp(run.info))
            and len(kept.value)
        ):
            # The last bucket was open then, and the one before it may have waited for a measured step.
            first = int(kept.value["step"].iloc[-1]) - resolution
            before = kept.value[kept.value["step"] < first]
        rows = run.coarse(name, resolution, columns, first, last, **_of_layer(layer))
        self._note_damage(run)
        if "loss" in metrics:
            rows["loss_not_finite"] = rows["loss_nonfinite"] > 0
        rows = as_series(rows, metrics)
        return rows if before is None else pd.concat([before, rows], ignore_index=True)

    def _read_spectrum(self, run: Run, layer: str, head: int) -> pd.DataFrame:
        rows = run.table("spectra", ["step", "singular_values"], layer=layer, head=head)
        self._note_damage(run)
        lists = rows.column("singular_values").combine_chunks()
        length_s = pc.list_value_length(lists).fill_null(0).to_numpy()
        width = int(length_s.max(initial=0))
        sigma_sk = np.full((len(lists), width), np.nan)
        sigma_sk[np.arange(width) < length_s[:, None]] = lists.flatten().to_numpy(zero_copy_only=False)
        index = pd.Index(rows.column("step").to_numpy(), name="step")
        return pd.DataFrame(sigma_sk, index=index, columns=range(1, width + 1))

    def _note_damage(self, run: Run) -> None:
        self._damaged.setdefault(str(run.path), {}).update(run.damaged)


def _of_layer(layer: str | None) -> dict[str, Any]:
    return {} if layer is None else {"layer": layer}


def _rows_of(stamp: object) -> object:
    """The part of a stamp that changes when rows that were read may be void."""
    return stamp[:3] if isinstance(stamp, tuple) else None


def _stamp(info: Mapping[str, Any]) -> Stamp:
    """Changes whenever run.json says that there may be more."""
    changing = (info.get(key) for key in ("attempt", "steps", "heartbeat_s", "state"))
    return *birth(info), *changing


READER = Reader()
