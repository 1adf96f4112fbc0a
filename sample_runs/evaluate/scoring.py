"""How alarms are scored. The unit is the run; every rule here is fixed before any threshold is.

An alarm is a finding raised with a status other than healthy. Alarms no more than `MERGE` steps after the one
before belong to its episode, and an episode counts where it begins.

- Failing runs (crash, never-learned): an episode that begins within `HORIZON` steps before the onset is a hit, and the
  first such one gives the lead. One that begins earlier is `early`: too far off to be tied to this failure, so
  no hit, and no false alarm either, since something may well have been wrong; its rate is given beside. At the
  onset or after it is late: a miss with a lead of 0.
- Healthy runs: every episode is a false alarm.
- Spike-recovered runs: episodes from `HORIZON` before the onset to `MERGE` steps after recovery count for nothing,
  all others are false.
- Degraded runs count for nothing: nobody can say whether an alarm there is right.

A prediction that stands from the first step on (a rule that sees hyperparameters only) is not held to the
horizon: that favours it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .corpus import HEALTHY, SPIKE, Course

HORIZON = 200
HORIZONS = (10, 50, HORIZON)
MERGE = 50


@dataclass(frozen=True)
class Outcome:
    """What a set of alarms was worth on one run.

    Attributes:
        verdict: of failing runs `hit`, `early`, `late` or `silent`; of others `quiet`, `false` or `excused`.
        lead: steps between the first episode in the horizon and the onset; 0 where there is none.
        begins: steps at which the episodes begin.
        within: for each of `HORIZONS` whether an episode begins within that many steps before the onset.
        false, quiet_steps: false episodes, and the steps in which an episode would have been one.
        early, early_steps: the same for the share of a failing run that lies before the horizon.
    """

    course: Course
    verdict: str
    lead: int = 0
    begins: tuple[int, ...] = ()
    within: tuple[bool, ...] = (False,) * len(HORIZONS)
    false: int = 0
    quiet_steps: int = 0
    early: int = 0
    early_steps: int = 0


def episodes(alarms: Iterable[int]) -> tuple[int, ...]:
    """The steps at which episodes begin, of the steps at which alarms were raised."""
    begins: list[int] = []
    last: int | None = None
    for step in sorted(alarms):
        if last is None or step - last > MERGE:
            begins.append(step)
        last = step
    return tuple(begins)


def excused(course: Course) -> tuple[int, int]:
    """First and last step of a spike-recovered run in which alarms count for nothing."""
    assert course.label == SPIKE
    onset = 0 if course.onset is None else course.onset
    end = int(course.block.every_step[-1]) if course.recovered is None else course.recovered + MERGE
    return onset - HORIZON, end


def judge(course: Course, alarms: Sequence[int], *, standing: bool = False) -> Outcome:
    """Scores the alarms raised on one run; `standing`: they are predictions that hold from then on."""
    begins = episodes(alarms)
    if course.failing:
        return _judge_failing(course, begins, standing=standing)
    if course.label == HEALTHY:
        return Outcome(
            course, "false" if begins else "quiet", begins=begins, false=len(begins), quiet_steps=course.steps
        )
    if course.label == SPIKE:
        first, last = excused(course)
        wrong = [step for step in begins if not first <= step <= last]
        every = course.block.every_step
        inside = int(((every >= first) & (every <= last)).sum())
        return Outcome(
            course,
            "false" if wrong else "excused" if begins else "quiet",
            begins=begins,
            false=len(wrong),
            quiet_steps=course.steps - inside,
        )
    return Outcome(course, "excused" if begins else "quiet", begins=begins)


def _judge_failing(course: Course, begins: tuple[int, ...], *, standing: bool) -> Outcome:
    assert course.onset is not None
    onset = course.onset
    ahead = [onset - step for step in begins if step < onset]
    leads = [lead for lead in ahead if lead <= HORIZON or standing]
    if leads:
        verdict = "hit"
    elif ahead:
        verdict = "early"
    else:
        verdict = "late" if begins else "silent"
    return Outcome(
        course,
        verdict,
        lead=max(leads, default=0),
        begins=begins,
        within=tuple(any(lead <= horizon or standing for lead in ahead) for horizon in HORIZONS),
        early=0 if standing else len(ahead) - len(leads),
        early_steps=int((course.block.every_step < onset - HORIZON).sum()),
    )
