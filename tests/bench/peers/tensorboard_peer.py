"""TensorBoard: torch's SummaryWriter, one `add_scalar` a value; read by TensorBoard's own event reader."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
from torch.utils.tensorboard import SummaryWriter
from verbs import run

_NAMES = ("loss", "lr", "accuracy", "norm")


class TensorBoard:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, names: Sequence[str]) -> None:
        self._names = names
        self._writer: Any = SummaryWriter(self._folder)

    def before(self, step: int) -> None:
        pass

    def log(self, step: int, values: Sequence[float]) -> None:
        for name, value in zip(self._names, values, strict=True):
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()

    def count(self) -> int:
        """Steps of which every value is there."""
        read = self._read()
        found = [{event.step for event in read.Scalars(tag)} for tag in read.Tags()["scalars"]]
        return len(set.intersection(*found)) if found else 0

    def write_series(self, losses: Sequence[float]) -> None:
        self.start(["loss"])
        for step, loss in enumerate(losses):
            self.log(step, [loss])
        self.close()

    def read_series(self) -> int:
        return len(self._read().Scalars("loss"))

    def write_runs(self, number: int) -> None:
        first = self._folder / "run-0000"
        short = TensorBoard(first)
        short.start(_NAMES)
        for step in range(100):
            short.log(step, [1.0] * len(_NAMES))
        short.close()
        for index in range(1, number):
            shutil.copytree(first, self._folder / f"run-{index:04d}")

    def list_runs(self) -> int:
        """As its server does before it shows a run: the event files are read."""
        multiplexer = EventMultiplexer()
        multiplexer.AddRunsFromDirectory(str(self._folder))
        multiplexer.Reload()
        return len(multiplexer.Runs())

    def _read(self) -> Any:
        # Every scalar: by default the reader keeps a random sample of 10,000.
        accumulator = EventAccumulator(str(self._folder), size_guidance={"scalars": 0})
        accumulator.Reload()
        return accumulator


if __name__ == "__main__":
    run(TensorBoard)
