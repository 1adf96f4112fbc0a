"""A run in four numbers, kept in run.json so that a list of a thousand runs reads nothing else."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

Row = Mapping[str, Any]


@dataclass
class Summary:
    """What was seen so far; None: nothing.

    Attributes:
        last_loss: of the last step with a finite one.
        lowest_entropy: of any head at any step, nats.
        highest_sec: highest mean over heads of sec_1 at any step.
        last_measured_step: the last measured step that is on record.
    """

    last_loss: float | None = None
    lowest_entropy: float | None = None
    highest_sec: float | None = None
    last_measured_step: int | None = None

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Self:
        """What a manifest says of the run so far."""
        kept = manifest.get("summary") or {}
        return cls(**{field.name: kept.get(field.name) for field in fields(cls)})

    def see_steps(self, rows: Sequence[Row]) -> None:
        for row in reversed(rows):
            if row["loss"] is not None and math.isfinite(row["loss"]):
                self.last_loss = row["loss"]
                return

    def see_measured(self, step: int, attention: Sequence[Row], spectra: Sequence[Row]) -> None:
        self.last_measured_step = step
        entropies = _finite(attention, "entropy")
        if entropies:
            self.lowest_entropy = min(entropies + _known(self.lowest_entropy))
        shares = _finite(spectra, "sec_1")
        if shares:
            self.highest_sec = max([statistics.fmean(shares), *_known(self.highest_sec)])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _finite(rows: Sequence[Row], column: str) -> list[float]:
    return [row[column] for row in rows if row[column] is not None and math.isfinite(row[column])]


def _known(value: float | None) -> list[float]:
    return [] if value is None else [value]
