"""What a detector says: one vocabulary for alerts raised live, for the report and for the dashboard."""

from dataclasses import dataclass, field
from typing import Any

SEVERITIES = ("info", "warning", "critical")
STATUSES = ("healthy", "at-risk", "collapsed", "diverged", "no-data")


@dataclass(frozen=True)
class Finding:
    """One thing a detector found.

    Attributes:
        kind: the pathology, in kebab-case (`entropy-collapse`, `divergence`, ...).
        severity: `info`, `warning` or `critical`.
        layer: module path of the worst layer, None where the finding is of the whole run.
        head: query head in that layer, None where the finding is of the whole layer or run.
        first_step: step at which the alarm was raised.
        evidence: numbers that led to it, by name; with them the healthy band they left.
        advice: what to do, with the command to type.
        message: one sentence for people: what is wrong, where, since when.
        status: what the run's status is while this finding is active.
        last_step: step at which the alarm was cleared, None while it is active.
    """

    kind: str
    severity: str
    layer: str | None
    head: int | None
    first_step: int
    evidence: dict[str, Any] = field(default_factory=dict)
    advice: str = ""
    message: str = ""
    status: str = "healthy"
    last_step: int | None = None

    @property
    def active(self) -> bool:
        return self.last_step is None

    def to_dict(self) -> dict[str, Any]:
        """The contract's keys first, then what people's reports need besides."""
        return {
            "kind": self.kind,
            "severity": self.severity,
            "layer": self.layer,
            "head": self.head,
            "first_step": self.first_step,
            "evidence": self.evidence,
            "advice": self.advice,
            "message": self.message,
            "last_step": self.last_step,
        }
