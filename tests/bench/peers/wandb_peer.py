"""wandb in offline mode. The release has no reader of its own that a program could call: `wandb_log.py` stands in."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import wandb
from verbs import run
from wandb_log import records

_NAMES = ("loss", "lr", "accuracy", "norm")


class Wandb:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, names: Sequence[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._names = names
        # Without what it would collect of the machine and the code: no other store keeps that.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            x_disable_stats=True,
            x_disable_meta=True,
        )
        self._run: Any = wandb.init(
            project="bench", dir=self._folder, mode="offline", settings=settings, config={"lr": 1e-3}
        )

    def before(self, step: int) -> None:
        pass

    def log(self, step: int, values: Sequence[float]) -> None:
        self._run.log(dict(zip(self._names, values, strict=True)), step=step)

    def close(self) -> None:
        self._run.finish()

    def count(self) -> int:
        # One record a step, written with all of its values once the step is known to have ended.
        return sum(1 for path in self._files() for _ in histories(path))

    def write_series(self, losses: Sequence[float]) -> None:
        self.start(["loss"])
        for step, loss in enumerate(losses):
            self.log(step, [loss])
        self.close()

    def read_series(self) -> int:
        items = (item for path in self._files() for history in histories(path) for item in history.item)
        return len([float(item.value_json) for item in items if "loss" in (item.key, *item.nested_key)])

    def write_runs(self, number: int) -> None:
        self.start(_NAMES)
        for step in range(100):
            self.log(step, [1.0] * len(_NAMES))
        self.close()
        (first,) = (path.parent for path in self._files())
        for index in range(1, number):
            shutil.copytree(first, first.with_name(f"{first.name[:-4]}{index:04d}"))

    def list_runs(self) -> int:
        """The configuration of each, from the head of its file."""
        return sum(any(_configures(record) for record in records(path)) for path in self._files())

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob("wandb/offline-run-*/*.wandb"))


def histories(path: Path) -> Iterator[Any]:
    return (record.history for record in records(path) if record.WhichOneof("record_type") == "history")


def _configures(record: Any) -> bool:
    return record.WhichOneof("record_type") == "run" and bool(record.run.config.update)


if __name__ == "__main__":
    run(Wandb)
