"""How a run stands apart from its verdict: running, stalled, crashed or resumed, and how old its data is."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from .phrases import counted, number, time_words


def state_lines(info: Mapping[str, Any], now_s: float | None = None) -> Iterator[str]:
    """What there is to say of it, a sentence each; nothing of a run that finished in one go.

    Args:
        info: `Run.info`.
        now_s: unix time; None: now.
    """
    now_s = time.time() if now_s is None else now_s
    state = info.get("state")
    # As the contract counts: `steps` of them, from 0.
    steps = info.get("steps")
    last = f"step {steps - 1:,}" if isinstance(steps, int) and steps else None
    if state == "running":
        yield (
            f"still running, {last} was {_age(info.get('last_step_s'), now_s)}"
            if last
            else (f"still running, no step yet, started {_age(info.get('started_s'), now_s)}")
        )
    elif state == "stalled":
        yield f"stalled: {last or 'no step yet'}, its process was last heard of {_age(_heard_s(info), now_s)}"
    elif state == "crashed":
        why = f": {_one_line(info['error'])}" if info.get("error") else ""
        yield f"crashed after {last or 'no step'}, last heard of {_age(_heard_s(info), now_s)}{why}"
    yield from _resumes(info)
    faults = info.get("faults")
    if isinstance(faults, list) and faults:
        first = faults[0] if isinstance(faults[0], Mapping) else {}
        what = f": {first.get('where')}: {_one_line(first.get('error'))}" if first else ""
        yield f"the recorder met {counted(len(faults), 'fault')} of its own, what it switched off was not measured{what}"


def resumed_from(info: Mapping[str, Any]) -> str | None:
    """`attempt 2, from step 200`; None for a run's first attempt."""
    attempts = _attempts(info)
    if len(attempts) < 2:  # noqa: PLR2004 - resumed once is two
        return None
    now = attempts[-1]
    first = now.get("first_step")
    where = f"from step {first:,}" if isinstance(first, int) else "no step yet"
    return f"attempt {number(now.get('attempt', len(attempts)))}, {where}"


def _resumes(info: Mapping[str, Any]) -> Iterator[str]:
    resumed = resumed_from(info)
    if resumed is not None:
        before = _attempts(info)[:-1]
        ended = ", ".join(f"attempt {number(one.get('attempt'))}: {one.get('state')}" for one in before)
        yield f"resumed: {resumed} ({ended})"


def _attempts(info: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    attempts = info.get("attempts")
    return [one for one in attempts if isinstance(one, Mapping)] if isinstance(attempts, list) else []


def _heard_s(info: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON; `_age` looks at it
    return info.get("ended_s") or info.get("heartbeat_s")


def _age(then_s: object, now_s: float) -> str:
    return f"{time_words(now_s - then_s)} ago" if isinstance(then_s, (int, float)) else "at an unknown time"


def _one_line(text: object) -> str:
    """The last line, which in a traceback is the one that says what it was."""
    lines = str(text).strip().splitlines()
    return lines[-1].strip() if lines else "unknown"
