"""What a recorded step takes from the training thread, and what it leaves on the disk."""

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from store_processes import OURS, STORES, TENSORBOARD, Refusals, RefusedError, Writer, ask
from store_verdict import Goals, table

_ROUNDS = 5
_REST_S = 0.3


@dataclass(frozen=True)
class Case:
    """How a step is recorded.

    Attributes:
        title: for people.
        values: of a step.
        apart: steps of a block, and the seconds of training that lie between two of them.
        at_once: steps of a block without a pause; 0: there is none, as a measured step needs a training step.
    """

    title: str
    values: int
    apart: tuple[int, float]
    at_once: int


CASES = (
    Case("4 scalars", 4, (100, 0.002), 200),
    Case("53 scalars", 53, (100, 0.002), 200),
    Case("a measured step, 240 values", 240, (20, 0.02), 0),
)


@dataclass
class Taken:
    """Seconds of single steps, CPU seconds of those with a pause between them, and the bytes of a step."""

    apart: list[float] = field(default_factory=list)
    apart_cpu: list[float] = field(default_factory=list)
    at_once: list[float] = field(default_factory=list)
    bytes_per_step: float | None = None


def measure(case: Case, root: Path, refusals: Refusals) -> dict[str, Taken]:
    """Every store in turns of one block, in an order that rotates; one that breaks is left out from then on."""
    taken: dict[str, Taken] = {}
    with ExitStack() as open_writers:
        writers: dict[str, Writer] = {}
        for store in STORES:
            with refusals.noted(store):
                writer = open_writers.enter_context(Writer(store, _folder(root, store, case), case.values))
                writer.block(*case.apart)  # warms up: libraries, files, the model
                writers[store], taken[store] = writer, Taken()
        order = list(writers)
        for turn in range(_ROUNDS):
            for index in range(len(order)):
                store = order[(index + turn) % len(order)]
                if store in taken and not _round(case, writers[store], taken[store], store, refusals):
                    del taken[store]
    steps = case.apart[0] + _ROUNDS * (case.apart[0] + case.at_once)
    for store, times in taken.items():
        with refusals.noted(store):
            folder = _folder(root, store, case)
            found = ask(store, "count", folder)[-1]
            if found != steps:
                raise RefusedError(f"it keeps {found} of {steps} steps of a run that was closed")
            times.bytes_per_step = _size(folder) / steps
    return taken


def _round(case: Case, writer: Writer, times: Taken, store: str, refusals: Refusals) -> bool:
    """One block with pauses and one without; False where the store broke."""
    with refusals.noted(store):
        seconds, cpu_s = writer.block(*case.apart)
        times.apart += seconds
        times.apart_cpu += cpu_s
        time.sleep(_REST_S)  # what it left to threads and processes beside it shall not slow the next
        if case.at_once:
            times.at_once += writer.block(case.at_once, 0.0)[0]
            time.sleep(_REST_S)
        return True
    return False


def _folder(root: Path, store: str, case: Case) -> Path:
    return root / f"{store.replace(' ', '-')}-{case.values}"


def _size(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def speed_table(measured: dict[Case, dict[str, Taken]], goals: Goals) -> Table:
    shown = table(
        "time of a recorded step on the training thread, microseconds",
        (
            "values",
            "store",
            "median",
            "quartiles",
            "99 %",
            "CPU",
            "of TensorBoard's",
            "without pause",
            "of TensorBoard's",
        ),
    )
    for case, taken in measured.items():
        for store in STORES:
            if store not in taken:
                shown.add_row(case.title, store, "not measured")
                continue
            times = taken[store]
            cuts = statistics.quantiles(times.apart, n=100)
            shown.add_row(
                case.title,
                store,
                _us(cuts[49]),
                f"{_us(cuts[24])} to {_us(cuts[74])}",
                _us(cuts[98]),
                _us(statistics.median(times.apart_cpu)),
                _ratio(times.apart, taken, "apart"),
                _us(statistics.median(times.at_once)) if times.at_once else "",
                _ratio(times.at_once, taken, "at_once"),
            )
        shown.add_section()
        goal = f"{case.title}: no slower than TensorBoard"
        if OURS not in taken or TENSORBOARD not in taken:
            goals.add(goal, "", met=None)
        else:
            ours, theirs = (statistics.median(taken[store].apart) for store in (OURS, TENSORBOARD))
            goals.add(goal, f"{ours / theirs:.2f} of its time", met=ours <= theirs)
    return shown


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.0f}"


def _ratio(times: Sequence[float], taken: dict[str, Taken], attribute: str) -> str:
    if TENSORBOARD not in taken or not times:
        return ""
    return f"{statistics.median(times) / statistics.median(getattr(taken[TENSORBOARD], attribute)):.2f}"


def bytes_table(measured: dict[Case, dict[str, Taken]]) -> Table:
    shown = table(
        "bytes a step on the disk once the run is closed", ("store", *(case.title for case in measured))
    )
    for store in STORES:
        cells = []
        for taken in measured.values():
            size = taken[store].bytes_per_step if store in taken else None
            cells.append("not measured" if size is None else f"{size:.0f}")
        shown.add_row(store, *cells)
    return shown
