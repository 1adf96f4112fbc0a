"""The run directory against what a user would pick instead: `python tests/bench/store.py`.

TensorBoard's SummaryWriter, trackio, wandb in offline mode and one line of JSON a step, with the same values and in
one run; they live in `.venv-bench`, which `make bench` makes. A store that cannot be installed or run has no figure,
and the reason stands below. Everything is written to a temporary folder; nothing leaves the machine.
Steps are timed in blocks that take turns, each store in a process of its own. Where nothing else is said, 2 ms of
matrix products lie between two steps (20 ms for measured ones), as training would: what a store leaves to a thread of
its own is done meanwhile. Of a measured step, ours is what that `recorder.step` takes after real training steps, the
weights it sets aside for the writer's thread included; peers log 240 values that somebody else has computed.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from rich.console import Console
from store_kill import kill_table
from store_processes import OURS, Refusals, ask, recording
from store_reading import list_table, picture_line, series_table
from store_speed import CASES, bytes_table, measure, speed_table
from store_verdict import Goals

SECTIONS = ("speed", "kill", "list", "series", "recording")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=SECTIONS, action="append", help="these parts alone")
    chosen = parser.parse_args().only or SECTIONS
    console = Console(width=150)
    goals, refusals = Goals(), Refusals()
    started_s = time.perf_counter()
    console.print(f"{os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory(prefix="store-bench-") as name:
        root = Path(name)
        if "speed" in chosen:
            measured = {case: measure(case, _made(root / "speed"), refusals) for case in CASES}
            console.print(speed_table(measured, goals), bytes_table(measured))
            console.print(_same_values(root, refusals))
        if "kill" in chosen:
            console.print(kill_table(_made(root / "kill"), refusals, goals))
        if "list" in chosen:
            console.print(list_table(_made(root / "list"), refusals, goals))
        if "series" in chosen:
            console.print(series_table(_made(root / "series"), refusals, goals))
            console.print(picture_line(root / "series" / OURS, refusals, goals))
        if "recording" in chosen:
            console.print(_recording(root / "recording", refusals))
    console.print(goals.table())
    for line in refusals.lines():
        console.print(line)
    console.print(f"load after {os.getloadavg()[0]:.1f}; took {time.perf_counter() - started_s:.0f} s")


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder


def _recording(folder: Path, refusals: Refusals) -> str:
    with refusals.noted(OURS):
        return recording(folder)
    return "recording of 10,000 steps: not measured"


def _same_values(root: Path, refusals: Refusals) -> str:
    """What the recorder writes beside the 240 values would make the comparison of bytes unfair to it."""
    with refusals.noted(OURS):
        size = ask(OURS, "values", root / "values")[-1]
        return (
            "ours, of a measured step: with singular values, update ratios, coarse tables and the 9 unmeasured steps "
            f"before it; the same 240 values alone: {size} bytes"
        )
    return ""


if __name__ == "__main__":
    main()
