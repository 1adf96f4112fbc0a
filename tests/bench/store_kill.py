"""Share of the steps that a store's own reader finds after the recording process was killed (signal 9)."""

import time
from pathlib import Path

from rich.table import Table
from store_processes import OURS, STORES, Refusals, ask
from store_verdict import Goals, table

_CASES = ((20, 0.1), (200, 0.01), (2000, 0.0))
_SETTLE_S = 2.0
"""wandb's service outlives the killed process and may still write what it was sent."""


def kill_table(root: Path, refusals: Refusals, goals: Goals) -> Table:
    cases = [
        f"{steps} steps" + (f" x {pause_s * 1e3:.0f} ms" if pause_s else ", no pause")
        for steps, pause_s in _CASES
    ]
    shown = table("steps readable after kill -9, 4 scalars each", ("store", *cases))
    kept: dict[str, list[int | None]] = {store: [] for store in STORES}
    for steps, pause_s in _CASES:
        folders = {store: root / f"{store.replace(' ', '-')}-{steps}" for store in STORES}
        for store, folder in folders.items():
            with refusals.noted(store):
                ask(store, "die", folder, steps, pause_s)
        time.sleep(_SETTLE_S)
        for store, folder in folders.items():
            kept[store].append(_count(store, folder, refusals))
    for store, counts in kept.items():
        shown.add_row(
            store,
            *(
                "not measured" if count is None else f"{count} ({100 * count / steps:.4g} %)"
                for count, (steps, _) in zip(counts, _CASES, strict=True)
            ),
        )
    ours = kept[OURS]
    whole = [steps for steps, _ in _CASES]
    goals.add(
        "100 % of the steps after kill -9", f"{ours} of {whole}", met=None if None in ours else ours == whole
    )
    return shown


def _count(store: str, folder: Path, refusals: Refusals) -> int | None:
    with refusals.noted(store):
        return int(ask(store, "count", folder)[-1])
    return None
