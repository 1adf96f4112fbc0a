"""The small words of every verb: numbers, spans of time, places, forecasts, commands to type."""

import math
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from diagnostics.detect.finding import Finding

_MINUTE_S, _HOUR_S, _DAY_S = 60.0, 3600.0, 86400.0
# A line of advice quotes the commands in it; only inside such a quote does RUN stand for the run's path.
_COMMAND = re.compile(r"`(diagnostics [^`]*)`")


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def number(value: Any) -> str:  # noqa: ANN401 - evidence holds numbers, names, bands and lists of them
    """A value as people write it: four significant digits, `not observed` for null, a band as `low to high`."""
    if value is None:
        return "not observed"
    if isinstance(value, (Mapping, list, tuple)):
        return _several(value)
    if isinstance(value, float):
        return "NaN" if math.isnan(value) else f"{value:.4g}"
    return str(value)


def _several(values: Mapping[str, Any] | Sequence[Any]) -> str:
    if not values:
        return "none"
    if isinstance(values, Mapping):
        return ", ".join(f"{name} {number(entry)}" for name, entry in values.items())
    is_band = len(values) == 2 and not any(isinstance(entry, str) for entry in values)  # noqa: PLR2004 - a band has two ends
    return (" to " if is_band else ", ").join(number(entry) for entry in values)


def evidence_words(evidence: Mapping[str, Any]) -> Iterator[str]:
    """Each number with the healthy band that it left (`<name>_healthy`); those that have one come first."""
    banded = [name for name in evidence if f"{name}_healthy" in evidence]
    for name in banded:
        yield f"{name} {number(evidence[name])} (healthy: {number(evidence[f'{name}_healthy'])})"
    told = {*banded, *(f"{name}_healthy" for name in banded)}
    for name in evidence:
        if name not in told:
            yield f"{name} {number(evidence[name])}"


def place(finding: Finding) -> str:
    """Where it is: layer and head, or the whole run."""
    if finding.layer is None:
        return "of the whole run"
    return f"in {finding.layer}" + ("" if finding.head is None else f", head {finding.head}")


def forecast_words(forecast: Mapping[str, Any], step: int | None) -> str:
    """When a collapse is to be expected: the steps left, their interval, how sure that is, and the step it would be.

    Args:
        forecast: `steps_to_collapse`, `low`, `high` (steps), `confidence` (0 to 1); any of them may be None.
        step: the step it counts from.
    """
    left = forecast.get("steps_to_collapse")
    if not _is_number(left):
        words, at = "collapse is coming, when cannot be told", ""
    elif left < 1.0:
        words, at = "collapse is here by now", ""
    else:
        words = f"collapse in about {_steps(left)} steps"
        at = "" if step is None else f": step ~{_steps(step + left)}"
    low, high = forecast.get("low"), forecast.get("high")
    if _is_number(low):
        words += f" ({_steps(low)} to {_steps(high)})" if _is_number(high) else f" ({_steps(low)} or more)"
    confidence = forecast.get("confidence")
    return words + (f", {100.0 * confidence:.0f} % sure" if _is_number(confidence) else "") + at


def forecast_ground(forecast: Mapping[str, Any]) -> str:
    """What a forecast rests on: the head that is first to get there, by which number; empty where it does not say."""
    signal, layer, head, now, level = map(forecast.get, ("signal", "layer", "head", "now", "level"))
    if signal is None or level is None:
        return ""
    where = "" if layer is None else f" in {layer}" + ("" if head is None else f", head {head},")
    return f"{signal}{where} is {number(now)} and heads for {number(level)}"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _steps(value: float) -> str:
    return f"{round(value):,}"


def time_words(seconds: float) -> str:
    """A span of time in its largest unit."""
    seconds = max(0.0, seconds)
    if seconds < _MINUTE_S:
        return f"{seconds:.0f} s"
    if seconds < _HOUR_S:
        return f"{seconds / _MINUTE_S:.0f} min"
    return f"{seconds / _HOUR_S:.0f} h" if seconds < 2 * _DAY_S else f"{seconds / _DAY_S:.0f} days"


def with_path(advice: str, run_dir: str | os.PathLike[str]) -> str:
    """Advice whose commands name the run: findings know no path and say RUN; here it is known, to be pasted."""
    path = shlex.quote(os.fspath(run_dir))
    return _COMMAND.sub(lambda found: re.sub(r"\bRUN\b", lambda _: path, found[0], count=1), advice)


def commands_in(advice: str) -> list[str]:
    """The commands that a line of advice quotes."""
    return _COMMAND.findall(advice)
