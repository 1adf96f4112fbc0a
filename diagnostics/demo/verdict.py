"""What the demonstration showed, in sentences made from the tables: whether the bound kept or brought back the loss."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diagnostics.demo.arms import WARMUP_STEPS
from diagnostics.store.read import open_run

LAST_STEPS = 20
BROUGHT_BACK_SHARE = 0.5
"""A rescue that closes less than half of the gap to the reference is not called one."""


def verdict(run_dirs: Sequence[Path]) -> list[str]:
    """Sentences that compare the arms' final losses (mean of the last 20 steps)."""
    finals = {run_dir.name: _final_loss(run_dir) for run_dir in run_dirs}
    needed = ("gpt-warmup", "gpt-no-warmup", "gpt-no-warmup-bound", "gpt-rescued")
    if any(finals.get(name) is None for name in needed):
        return ["not every arm has a loss, so the arms cannot be compared"]
    losses = {name: loss for name, loss in finals.items() if loss is not None}
    healthy, failing = losses["gpt-warmup"], losses["gpt-no-warmup"]
    if failing <= healthy:
        short = " (the runs are too short for it)" if _steps(run_dirs[0]) <= WARMUP_STEPS else ""
        return [
            f"training without warmup did not fall behind: {failing:.3f} against {healthy:.3f} with it{short}"
        ]
    return [
        f"without warmup the loss ends at {failing:.3f} instead of {healthy:.3f}",
        _closed("bound from the first step", losses["gpt-no-warmup-bound"], healthy, failing),
        _closed(_rescue(run_dirs), losses["gpt-rescued"], healthy, failing),
    ]


def _closed(what: str, loss: float, healthy: float, failing: float) -> str:
    share = (failing - loss) / (failing - healthy)
    if share >= BROUGHT_BACK_SHARE:
        return f"{what}: {loss:.3f}, {100 * share:.0f} % of the gap to the reference closed"
    if share > 0.0:
        return (
            f"{what}: {loss:.3f}, only {100 * share:.0f} % of the gap closed: it stops the damage, but did not bring the "
            "loss back within these steps; arm the bound earlier, or restart from a checkpoint before the first finding"
        )
    return f"{what}: {loss:.3f}, no better than untouched: it did not bring the loss back within these steps"


def _rescue(run_dirs: Sequence[Path]) -> str:
    events = open_run(next(path for path in run_dirs if path.name == "gpt-rescued")).events(["step", "kind"])
    applied = events[events["kind"] == "control"]["step"]
    return (
        f"bound armed on the way, from step {int(applied.iloc[0])}"
        if len(applied)
        else "rescue that no alert called for"
    )


def _final_loss(run_dir: Path) -> float | None:
    loss = open_run(run_dir).steps(["loss"])["loss"].to_numpy()[-LAST_STEPS:]
    return float(np.mean(loss)) if len(loss) and np.isfinite(loss).all() else None


def _steps(run_dir: Path) -> int:
    return int(open_run(run_dir).info["steps"])
