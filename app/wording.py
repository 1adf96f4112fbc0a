"""How states, verdicts and numbers read on the pages."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diagnostics.detect.finding import Finding
from diagnostics.report import Report

from .summary import place

BadgeColour = Literal["red", "orange", "blue", "green", "gray"]


@dataclass(frozen=True)
class Badge:
    """How one state or status is shown: never by colour alone."""

    symbol: str
    colour: BadgeColour


BADGES: dict[str, Badge] = {
    "healthy": Badge("✔", "green"),
    "at-risk": Badge("▲", "orange"),
    "collapsed": Badge("✖", "red"),
    "diverged": Badge("✖", "red"),
    "no-data": Badge("○", "gray"),
    "running": Badge("▶", "blue"),
    "stalled": Badge("‖", "orange"),
    "crashed": Badge("✖", "red"),
    "finished": Badge("■", "gray"),
}
_HEALTHY = "_healthy"
_NO_BADGE = Badge("○", "gray")


def badge(word: str) -> Badge:
    return BADGES.get(word, _NO_BADGE)


def labelled(word: str) -> str:
    """`✖ collapsed`."""
    return f"{badge(word).symbol} {word}"


def plain(text: str) -> str:
    """Text as Markdown that shows it as it is: module paths and messages are no formatting."""
    return re.sub(r"([\\`*_{}\[\]<>#$~|:])", r"\\\1", text)


def prose(text: str) -> str:
    """Text as Markdown that shows it as it is, but for `code` between backticks."""
    parts = text.split("`")
    if len(parts) % 2 == 0:
        return plain(text)
    return "".join(f"`{part}`" if inside % 2 else plain(part) for inside, part in enumerate(parts))


def number(value: object) -> str:
    """A measured number for people; what was not measured says so."""
    if value is None or value != value:  # noqa: PLR0124 - NaN is the one value that is not itself
        return "not observed"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def verdict(report: Report) -> str:
    """The run's state in one sentence."""
    active = [finding for finding in report.findings if finding.active]
    if report.status == "no-data":
        return "There is no data to judge yet."
    until = "" if report.step is None else f" (judged up to step {report.step:,})"
    if not active:
        cleared = len(report.findings)
        past = f"; {cleared} earlier finding{'s' if cleared > 1 else ''} cleared again" if cleared else ""
        return f"No sign of a training pathology{past}{until}."
    sentence = active[0].message or headline(active[0])
    return f"{sentence[:1].upper()}{sentence[1:]}{until}"


def headline(finding: Finding) -> str:
    """`entropy-collapse in blocks.0.attn head 1, since step 50`."""
    where = place(finding.layer, finding.head)
    until = "" if finding.last_step is None else f", cleared at step {finding.last_step:,}"
    return f"{finding.kind}{f' in {where}' if where else ''}, since step {finding.first_step:,}{until}"


def evidence(values: Mapping[str, Any]) -> str:
    """`entropy 0.31 (healthy: above 0.5), sec 1 0.97`: what `NAME_healthy` holds belongs to `NAME`."""
    healthy = {
        name.removesuffix(_HEALTHY): value for name, value in values.items() if name.endswith(_HEALTHY)
    }
    words = []
    for name, value in values.items():
        if name.endswith(_HEALTHY) and name.removesuffix(_HEALTHY) in values:
            continue
        band = f" (healthy: {_evidence_value(healthy[name])})" if name in healthy else ""
        words.append(f"{name} {_evidence_value(value)}{band}")
    return " · ".join(words)


def forecast(values: Mapping[str, float]) -> str:
    """`collapse in about 120 steps (between 80 and 200), confidence 0.7`."""
    low, high = values.get("low"), values.get("high")
    between = "" if low is None or high is None else f" (between {low:,.0f} and {high:,.0f})"
    confidence = values.get("confidence")
    sure = "" if confidence is None else f", confidence {confidence:.2f}"
    return f"Collapse forecast in about {values['steps_to_collapse']:,.0f} steps{between}{sure}."


def ago(unix_s: object) -> str:
    """`3 min ago`, for a unix time."""
    if not isinstance(unix_s, (int, float)):
        return "not known"
    passed_s = max(0.0, time.time() - unix_s)
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if passed_s >= length_s:
            return f"{passed_s / length_s:.0f} {unit} ago"
    return f"{passed_s:.0f} s ago"


def resolution_words(resolution: int) -> str:
    """What a point of a curve is, where it is no single step."""
    return (
        f"Each point stands for {resolution:,} steps: the line is their mean, the band reaches from the lowest to the "
        "highest, so that a spike of one step is seen. Zoom in for single steps."
    )


def _evidence_value(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(number(item) for item in value)}]"
    if isinstance(value, Mapping):
        return f"({evidence(value)})"
    return number(value)
