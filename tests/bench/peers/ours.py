"""This project's store, under the same verbs as its peers; run by the project's own environment.

With 240 names a step is a measured one of a model of 4 layers of 4 heads, trained for real: ten steps apart, as by
default. With fewer it is an unmeasured one, which holds what the user hands over.
"""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

import typer
from big_runs import write_big_run, write_runs
from verbs import run, walks

from diagnostics import open_run
from diagnostics.app.data import ROUGH_POINTS, Reader
from diagnostics.app.step_charts import overview_figure
from diagnostics.app.summary import marks_of, tau_spans
from diagnostics.cli.list_runs import list_runs
from diagnostics.store.format import SCHEMAS
from diagnostics.store.write import PartWriter

MEASURED_NAMES = 240
EVERY = 10
_ATTENTION = [name for name in SCHEMAS["attention"].names if name not in ("step", "layer", "head", "rows")]
_SPECTRA = [
    name for name in SCHEMAS["spectra"].names if name not in ("step", "layer", "head", "singular_values")
]


class Ours:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, names: Sequence[str]) -> None:
        from store_training import Training  # noqa: PLC0415 - brings torch, and a reader has none

        self._names = names[1:]
        self._measures = len(names) == MEASURED_NAMES
        self._training = Training(self._folder, every=EVERY if self._measures else 10**9)

    def before(self, step: int) -> None:
        if self._measures:
            for _ in range(EVERY - 1 if step else 0):
                self._training.recorder.step(loss=self._training.step())
            self._training.step()
        elif step == 0:
            self._training.step()

    def log(self, _: int, values: Sequence[float]) -> None:
        if self._measures:
            self._training.recorder.step(loss=values[0])
        else:
            self._training.recorder.step(loss=values[0], **dict(zip(self._names, values[1:], strict=True)))

    def close(self) -> None:
        self._training.recorder.close()

    def count(self) -> int:
        run_ = open_run(self._folder)
        frame = run_.steps(columns=["step", "measured"])
        return int(frame["measured"].sum() if run_.info["every"] == EVERY else frame["step"].nunique())

    def write_series(self, losses: Sequence[float]) -> None:
        """A run with 1,008 series of heads besides, which the peers' runs are spared."""
        write_big_run(self._folder, steps=len(losses), every=EVERY)

    def read_series(self) -> int:
        return len(open_run(self._folder).steps(columns=["loss"])["loss"].to_numpy())

    def read_head(self) -> int:
        """Entropy of one head of 144."""
        frame = open_run(self._folder).attention(columns=["step", "entropy"], layer="blocks.7.attn", head=5)
        return len(frame["entropy"].to_numpy())

    def write_runs(self, number: int) -> None:
        write_runs(self._folder, number)

    def list_runs(self) -> int:
        """The verb of the command line, without the start of a process."""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(typer.Exit):
            list_runs(self._folder)
        return sum("run-" in line for line in said.getvalue().splitlines())

    def draw(self) -> int:
        """What a fresh server does before the run page shows its chart: the first figure; its points. A finer one follows."""
        reader = Reader()
        info, events = reader.info(self._folder), reader.table(self._folder, "events")
        curves = reader.curves(self._folder, most=ROUGH_POINTS)
        figure = overview_figure(curves, marks_of(events), tau_spans(events, info), uirevision="run")
        figure.to_json()
        return sum(len(trace.x) for trace in figure.data if trace.x is not None)

    def write_values(self) -> int:
        """Bytes that 240 values of a measured step take: 15 of each head of 16, in the tables they belong to."""
        values = walks(MEASURED_NAMES)
        writer = PartWriter(self._folder)
        self._folder.mkdir()
        for step, row in enumerate(values):
            heads = [row[start : start + 15] for start in range(0, MEASURED_NAMES, 15)]
            keys = [
                {"step": EVERY * step, "layer": f"blocks.{at // 4}.attn", "head": at % 4} for at in range(16)
            ]
            writer.add(
                "attention",
                [
                    {**key, **dict(zip(_ATTENTION, head[:6], strict=True))}
                    for key, head in zip(keys, heads, strict=True)
                ],
            )
            writer.add(
                "spectra",
                [
                    {**key, **dict(zip(_SPECTRA, head[6:13], strict=True)), "singular_values": head[13:]}
                    for key, head in zip(keys, heads, strict=True)
                ],
            )
            if step % 100 == 99:
                writer.flush()
        return sum(path.stat().st_size for path in self._folder.rglob("*.parquet")) // len(values)


if __name__ == "__main__":
    run(Ours, head=Ours.read_head, values=Ours.write_values, picture=Ours.draw)
