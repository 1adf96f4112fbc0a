"""The head that a watcher should look at first: the one whose attention is sharpest."""

import math
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from diagnostics.store.read import Run

from .phrases import number

_GROWTH_STEPS = 50


@dataclass(frozen=True)
class WorstHead:
    """The head with the lowest entropy at one measured step.

    Attributes:
        step: the step.
        layer: its layer.
        head: its index there.
        entropy: in nats.
        max_logit: its largest scaled logit; None: not measured.
        sigma1: of its query-key product; None: not measured.
        growth: sigma1 over what it was `growth_steps` before; None: not known.
        growth_steps: about fifty, fewer early in a run.
    """

    step: int
    layer: str
    head: int
    entropy: float
    max_logit: float | None
    sigma1: float | None
    growth: float | None
    growth_steps: int

    @property
    def words(self) -> str:
        grown = "" if self.growth is None else f" (x{self.growth:.3g} in {self.growth_steps} steps)"
        return (
            f"{self.layer}, head {self.head}: entropy {number(self.entropy)} nats, "
            f"max logit {number(self.max_logit)}, sigma1 {number(self.sigma1)}{grown}"
        )


def worst_head(run: Run, step: int) -> WorstHead | None:
    """Reads it from the rows of `step` and the fifty steps before, no others; None where no entropy was measured."""
    rows = run.table("attention", ["layer", "head", "entropy", "max_logit"], step, step)
    rows = rows.filter(pc.is_finite(pc.field("entropy")))
    if not rows.num_rows:
        return None
    worst = rows.take(pc.sort_indices(rows, [("entropy", "ascending")])[:1]).to_pylist()[0]
    layer, head = worst["layer"], worst["head"]
    spectra = run.table("spectra", ["step", "sigma1"], step - _GROWTH_STEPS, step, layer=layer, head=head)
    sigma1, growth, growth_steps = _growth(spectra, step)
    return WorstHead(step, layer, head, worst["entropy"], worst["max_logit"], sigma1, growth, growth_steps)


def _growth(spectra: pa.Table, step: int) -> tuple[float | None, float | None, int]:
    known = {row["step"]: row["sigma1"] for row in spectra.to_pylist() if row["sigma1"] is not None}
    now = known.get(step)
    first = min(known, default=step)
    if now is None or first == step or not known[first] > 0.0 or not math.isfinite(now):
        return now, None, 0
    return now, now / known[first], step - first
