"""What a detector says: one vocabulary for alerts raised live, for the report and for the dashboard."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
        first_step: step at which what raised the alarm began.
        evidence: numbers that led to it, by name; with them the healthy band they left.
        advice: what to do, with the command to type.
        message: one sentence for people: what is wrong, where, since when.
        status: what the run's status is while this finding is active.
        raised_step: step at which the alarm was raised: persistence takes a few measured steps.
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
    raised_step: int | None = None
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
            "status": self.status,
            "raised_step": self.raised_step,
            "last_step": self.last_step,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Finding":
        """Reads back what `to_dict` gave."""
        return cls(**values)


class FindingLog:
    """The findings of one detector, in the order they were raised, each as it stands now."""

    def __init__(self) -> None:
        self._findings: list[Finding] = []

    def __iter__(self) -> Iterator[Finding]:
        return iter(self._findings)

    def add(self, finding: Finding) -> list[Finding]:
        self._findings.append(finding)
        return [finding]

    def end(self, kind: str, step: int) -> None:
        """Marks the active finding of a kind as cleared at `step`."""
        self._findings = [
            replace(finding, last_step=step) if finding.kind == kind and finding.active else finding
            for finding in self._findings
        ]

    def state_dict(self) -> list[dict[str, Any]]:
        return [finding.to_dict() for finding in self._findings]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        self._findings = [Finding.from_dict(values) for values in state]


def rounded(value: float) -> float | None:
    """A number for evidence: four digits after the point, None where it was not measured."""
    return None if value != value else round(float(value), 4)  # noqa: PLR0124 - NaN is what differs from itself


def in_words(value: float) -> str:
    """A number for a sentence."""
    return "not observed" if value != value else f"{value:.3g}"  # noqa: PLR0124 - as above
