"""The goals, reached or missed: said as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .figures import BUDGET
from .forecast import WITHIN

RECALL = 0.9
LEAD = 50


@dataclass(frozen=True)
class Goal:
    """What was to be reached, and what was."""

    words: str
    found: str
    reached: bool


def goals(document: Mapping[str, Any]) -> list[Goal]:
    """All goals that can be judged from what was measured."""
    own = document["held_out"]
    found = [
        Goal(f"recall at least {RECALL}", f"{own['recall']:.2f}", own["recall"] >= RECALL),
        Goal(
            f"at most {BUDGET} false-alarm episodes per 1,000 steps",
            f"{own['false_per_1000']:.3f}",
            own["false_per_1000"] <= BUDGET,
        ),
        Goal(f"median lead at least {LEAD} steps", f"{own['lead_median']:.0f}", own["lead_median"] >= LEAD),
        _better(own, document["baselines"]),
        *_coverage(document["forecast"]),
    ]
    if (real := document.get("real_logs")) is not None:
        found += [
            Goal(
                f"at most {BUDGET} false alarms per 1,000 points of real logs",
                f"{real['false_per_1000']:.3f}",
                real["false_per_1000"] <= BUDGET,
            ),
            Goal(
                "more crashes of real logs caught than by the best baseline",
                f"{real['hits']} of {real['failing']} against {real['best_baseline_hits']}",
                real["hits"] > real["best_baseline_hits"],
            ),
        ]
    return found


def _better(own: Mapping[str, Any], baselines: list[Mapping[str, Any]]) -> Goal:
    """Higher recall, or the same with a longer lead, than every baseline at thresholds frozen in the same way."""

    def worth(figures: Mapping[str, Any]) -> tuple[float, float]:
        return figures["recall"], figures["lead_median"]

    unbeaten = [row["name"] for row in baselines if worth(row["tuned"]) >= worth(own)]
    best = max((row["tuned"]["recall"] for row in baselines), default=0.0)
    told = f"best baseline's recall {best:.2f}" + (f"; not beaten: {', '.join(unbeaten)}" if unbeaten else "")
    return Goal("better than every baseline at the same false-alarm budget", told, not unbeaten)


def _coverage(forecast: Mapping[str, Any]) -> list[Goal]:
    said, covered = forecast["confidence"], forecast["rows"].get("all", {}).get("covered")
    words = f"forecast intervals of {said:.0%} cover within {WITHIN * 100:.0f} points"
    if covered is None:
        return [Goal(words, "no forecast could be judged", reached=False)]
    return [Goal(words, f"{covered:.1%}", abs(covered - said) <= WITHIN + 1e-9)]
