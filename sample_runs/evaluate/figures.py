"""Outcomes of many runs summed up: recall, leads, false alarms, each with its interval."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .corpus import HEALTHY
from .intervals import poisson, wilson
from .scoring import HORIZONS, Outcome

BUDGET = 0.1
"""False-alarm episodes per 1,000 quiet steps that the goal allows."""


@dataclass(frozen=True)
class Figures:
    """What a detector or a rule reached on a set of runs.

    Attributes:
        failing, hits, early, late: failing runs, those warned of in time, too early, only after the onset.
        leads: of every failing run, 0 where it was missed.
        within: hits for each of `HORIZONS`.
        false, quiet_steps: false episodes and the steps in which they could have been raised.
        healthy, alarmed: healthy runs and those with an alarm.
        early_episodes, early_steps: episodes in failing runs before the horizon, and the steps there.
    """

    failing: int
    hits: int
    early: int
    late: int
    leads: tuple[int, ...]
    within: tuple[int, ...]
    false: int
    quiet_steps: int
    healthy: int
    alarmed: int
    early_episodes: int
    early_steps: int

    @property
    def recall(self) -> float:
        return self.hits / self.failing if self.failing else 0.0

    @property
    def false_rate(self) -> float:
        """False episodes per 1,000 steps."""
        return 1000 * self.false / self.quiet_steps if self.quiet_steps else 0.0

    def lead(self, quantile: float) -> float:
        """Quantile of the leads, misses counted as 0."""
        return float(np.quantile(self.leads, quantile)) if self.leads else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Everything that is reported, ready for JSON."""
        low, high = poisson(self.false)
        per = 1000 / self.quiet_steps if self.quiet_steps else 0.0
        return {
            "failing": self.failing,
            "hits": self.hits,
            "recall": round(self.recall, 4),
            "recall_interval": _rounded(wilson(self.hits, self.failing)),
            "recall_within": {
                str(horizon): round(hits / self.failing, 4) if self.failing else 0.0
                for horizon, hits in zip(HORIZONS, self.within, strict=True)
            },
            "warned_at_least": {
                str(steps): round(sum(lead >= steps for lead in self.leads) / self.failing, 4)
                if self.failing
                else 0.0
                for steps in (10, 50)
            },
            "early": self.early,
            "late": self.late,
            "silent": self.failing - self.hits - self.early - self.late,
            "lead_median": round(self.lead(0.5), 1),
            "lead_quartiles": [round(self.lead(0.25), 1), round(self.lead(0.75), 1)],
            "lead_of_hits": round(float(np.median([lead for lead in self.leads if lead])), 1)
            if self.hits
            else None,
            "false_episodes": self.false,
            "quiet_steps": self.quiet_steps,
            "false_per_1000": round(self.false_rate, 4),
            "false_per_1000_interval": _rounded((low * per, high * per)),
            "healthy": self.healthy,
            "healthy_alarmed": self.alarmed,
            "healthy_share": round(self.alarmed / self.healthy, 4) if self.healthy else 0.0,
            "healthy_share_interval": _rounded(wilson(self.alarmed, self.healthy)),
            "early_episodes": self.early_episodes,
            "early_steps": self.early_steps,
        }


def pooled(outcomes: Sequence[Outcome]) -> Figures:
    """Sums up; the order of the outcomes plays no part."""
    failing = [outcome for outcome in outcomes if outcome.course.failing]
    healthy = [outcome for outcome in outcomes if outcome.course.label == HEALTHY]
    count = {verdict: sum(o.verdict == verdict for o in failing) for verdict in ("hit", "early", "late")}
    return Figures(
        failing=len(failing),
        hits=count["hit"],
        early=count["early"],
        late=count["late"],
        leads=tuple(sorted(outcome.lead for outcome in failing)),
        within=tuple(sum(outcome.within[i] for outcome in failing) for i in range(len(HORIZONS))),
        false=sum(outcome.false for outcome in outcomes),
        quiet_steps=sum(outcome.quiet_steps for outcome in outcomes),
        healthy=len(healthy),
        alarmed=sum(outcome.false > 0 for outcome in healthy),
        early_episodes=sum(outcome.early for outcome in failing),
        early_steps=sum(outcome.early_steps for outcome in failing),
    )


def _rounded(interval: tuple[float, float]) -> list[float]:
    return [round(value, 4) for value in interval]
