"""A run in four values, for the list: from its run.json, or, where an older recorder wrote none there, from its tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diagnostics.detect.finding import STATUSES
from diagnostics.errors import DiagnosticsError

from .data import Reader
from .judging import judged_unasked
from .summary import highest, last_value, lowest, number_of


@dataclass(frozen=True)
class Digest:
    """A run in four values; None where nothing was observed.

    Attributes:
        status: the verdict's; None where nobody has judged the run yet.
        last_loss: of the last step that has one.
        lowest_entropy: of any head at any step, nats.
        highest_sec: the highest mean SEC_1 over heads of any step.
    """

    status: str | None
    last_loss: float | None
    lowest_entropy: float | None
    highest_sec: float | None

    @classmethod
    def recorded(cls, info: Mapping[str, Any]) -> "Digest | None":
        """What run.json says; None where it holds no summary."""
        summary = info.get("summary")
        if not isinstance(summary, Mapping):
            return None
        return cls(
            recorded_status(info),
            number_of(summary.get("last_loss")),
            number_of(summary.get("lowest_entropy")),
            number_of(summary.get("highest_sec")),
        )


def recorded_status(info: Mapping[str, Any]) -> str | None:
    """What the detectors beside the recorder said; None where there were none, or they have not spoken yet."""
    status = info.get("status")
    return str(status) if status in STATUSES and status != "no-data" else None


def digest_of(run: str) -> Digest | str:
    """Reads a run for its digest, keeping nothing else of it; why it cannot be read, where that is so."""
    reader = Reader()
    try:
        info = reader.info(run)
        curves = reader.curves(run)
        # A list does not replay millions of rows for one word.
        status = reader.report(run).status if judged_unasked(info) else recorded_status(info) or "no-data"
    except DiagnosticsError as error:
        return str(error)
    return Digest(status, last_value(curves.loss), lowest(curves.entropy), highest(curves.sec_mean))
