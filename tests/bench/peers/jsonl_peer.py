"""Plain files: one line of JSON a step, flushed. What people write by hand."""

import json
from collections.abc import Sequence
from pathlib import Path

from verbs import run

_FILE = "metrics.jsonl"


class JsonLines:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, names: Sequence[str]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._names = names
        self._file = (self._folder / _FILE).open("w")

    def before(self, step: int) -> None:
        pass

    def log(self, step: int, values: Sequence[float]) -> None:
        self._file.write(json.dumps({"step": step, **dict(zip(self._names, values, strict=True))}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def count(self) -> int:
        lines = (self._folder / _FILE).read_text().splitlines()
        return len({json.loads(line)["step"] for line in lines if line.endswith("}")})

    def write_series(self, losses: Sequence[float]) -> None:
        self.start(["loss"])
        for step, loss in enumerate(losses):
            self.log(step, [loss])
        self.close()

    def read_series(self) -> int:
        with (self._folder / _FILE).open() as file:
            return len([json.loads(line)["loss"] for line in file])

    def write_runs(self, number: int) -> None:
        for index in range(number):
            JsonLines(self._folder / f"run-{index:04d}").write_series([1.0] * 100)

    def list_runs(self) -> int:
        """Name and last step of each, as a script would."""
        return len([(path.parent.name, _last_step(path)) for path in self._folder.glob(f"*/{_FILE}")])


def _last_step(path: Path) -> int:
    step: int = json.loads(path.read_text().splitlines()[-1])["step"]
    return step


if __name__ == "__main__":
    run(JsonLines)
