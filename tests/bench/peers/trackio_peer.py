"""trackio: its local SQLite file; read by its own storage module. Nothing leaves the machine."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verbs import run

_PROJECT, _RUN = "bench", "run"
_NAMES = ("loss", "lr", "accuracy", "norm")
_BATCH = 10_000


class Trackio:
    def __init__(self, folder: Path) -> None:
        os.environ["TRACKIO_DIR"] = str(folder)
        # Where its projects lie is read once, at import.
        import trackio  # noqa: PLC0415 - after its environment
        from trackio.sqlite_storage import SQLiteStorage  # noqa: PLC0415 - after its environment

        self._trackio: Any = trackio
        self._storage: Any = SQLiteStorage

    def start(self, names: Sequence[str]) -> None:
        self._names = names
        self._run = self._trackio.init(project=_PROJECT, name=_RUN, embed=False)

    def before(self, step: int) -> None:
        pass

    def log(self, step: int, values: Sequence[float]) -> None:
        self._run.log(dict(zip(self._names, values, strict=True)), step=step)

    def close(self) -> None:
        self._run.finish()

    def count(self) -> int:
        return len({row["step"] for row in self._storage.get_logs(_PROJECT, _RUN)})

    def write_series(self, losses: Sequence[float]) -> None:
        """By the call under its `log`, in batches: its sender gives up 30 s after the end of a run."""
        for start in range(0, len(losses), _BATCH):
            batch = losses[start : start + _BATCH]
            steps = list(range(start, start + len(batch)))
            self._storage.bulk_log(_PROJECT, _RUN, [{"loss": loss} for loss in batch], steps=steps)

    def read_series(self) -> int:
        return len(self._storage.get_metric_values(_PROJECT, _RUN, "loss"))

    def write_runs(self, number: int) -> None:
        rows = [dict.fromkeys(_NAMES, 1.0)] * 100
        for index in range(number):
            self._storage.bulk_log(_PROJECT, f"run-{index:04d}", rows, config={"lr": 1e-3})

    def list_runs(self) -> int:
        return len(self._storage.get_runs(_PROJECT))


if __name__ == "__main__":
    run(Trackio)
