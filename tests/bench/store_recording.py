"""A real recording of 10,000 steps: what it leaves on the disk, and how far the disk is behind meanwhile.

`python tests/bench/store_recording.py RUN_DIR`, by itself or from store.py.
"""

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from store_training import Training

from diagnostics import open_run
from diagnostics.store.format import PartName

STEPS = 10_000
_MOST_S = 150.0
"""On a busy machine the recording ends earlier, and says so by its number of steps."""
EVERY = 10
_LOOK_EVERY = 25
_READ_EVERY = 500


@dataclass
class Lag:
    """What a look at the run found.

    Attributes:
        steps: newest steps that are in no Parquet file yet.
        seconds: age of the oldest of them; 0 where there is none.
    """

    steps: int
    seconds: float


def record(folder: Path) -> Iterator[str]:
    """Lines for people."""
    closed_s: list[float] = []
    lags: list[Lag] = []
    missing: list[int] = []
    behind: list[int] = []
    training = Training(folder, every=EVERY)
    started_s = time.perf_counter()
    for step in range(STEPS):
        if time.perf_counter() - started_s > _MOST_S:
            break
        training.recorder.step(loss=training.step())
        closed_s.append(time.perf_counter())
        if step % _LOOK_EVERY == _LOOK_EVERY - 1:
            lags.append(_lag(folder, closed_s))
        if step % _READ_EVERY == _READ_EVERY - 1:
            run = open_run(folder)
            missing.append(step + 1 - len(run.steps(columns=["step"], start_step=0)))
            measured = run.attention(columns=["step"], start_step=max(0, step - 20 * EVERY))["step"]
            behind.append(step // EVERY * EVERY - int(measured.max()) if len(measured) else step)
    steps = len(closed_s)
    trained_s = time.perf_counter() - started_s
    share = training.recorder.overhead
    training.recorder.close()
    closing_s = time.perf_counter() - started_s - trained_s
    yield (
        f"recording of {steps:,} steps, every {EVERY}th measured (4 layers of 4 heads): {trained_s:.0f} s of training at "
        f"{1e3 * trained_s / steps:.1f} ms a step, {share:.1%} of it the recorder's on the training thread, "
        f"closed in {closing_s:.2f} s"
    )
    yield "on the disk: " + ", ".join(_content(folder, steps))
    yield (
        f"not in Parquet yet, at {len(lags)} looks: {_spread([lag.steps for lag in lags])} steps, the oldest "
        f"{_spread([lag.seconds for lag in lags], 's')} old; closed steps that a reader did not find, at {len(missing)} "
        f"looks: {sum(missing)}; heads' values behind the last measured step by at most {max(behind)} steps"
    )


def _lag(folder: Path, closed_s: list[float]) -> Lag:
    names = [PartName.parse(path.name) for path in (folder / "steps").glob("*.parquet")]
    written = 1 + max((name.last_step for name in names if name is not None), default=-1)
    waiting = len(closed_s) - written
    return Lag(waiting, time.perf_counter() - closed_s[written] if waiting else 0.0)


def _content(folder: Path, steps: int) -> Iterator[str]:
    whole = 0
    for entry in sorted(folder.iterdir()):
        files = [path for path in ([entry] if entry.is_file() else entry.rglob("*")) if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        whole += size
        if size:
            yield f"{entry.name} {len(files)} files {size / 1e3:,.0f} kB"
    yield f"together {whole / steps:,.0f} bytes a step"


def _spread(values: list[int] | list[float], unit: str = "") -> str:
    digits = 1 if unit else 0
    return (
        f"median {statistics.median(values):.{digits}f} {unit}".rstrip()
        + f", at most {max(values):.{digits}f} {unit}".rstrip()
    )


if __name__ == "__main__":
    for told in record(Path(sys.argv[1])):
        print(told)
