"""Exit codes of every verb, and how the codes of several runs become one."""

from collections.abc import Iterable

OK = 0
FOUND = 1
"""A finding at or above `--fail-on`, or a command that was rejected or expired."""
USAGE = 2
"""Wrong usage, or a path that cannot be read."""
NO_DATA = 3

# What a run's status weighs against --fail-on. `healthy` and `no-data` are below everything one may name.
SEVERITY = {"healthy": 0, "no-data": 0, "at-risk": 1, "collapsed": 2, "diverged": 3}

# A finding is certain whatever else could not be read; an unread run may hide one; no data hides nothing.
_WORST_FIRST = (FOUND, USAGE, NO_DATA, OK)


def exit_code(status: str, fail_on: str) -> int:
    """The code for one run's status.

    Args:
        status: a report's status.
        fail_on: `at-risk`, `collapsed` or `diverged`.
    """
    if status == "no-data":
        return NO_DATA
    return FOUND if SEVERITY[status] >= SEVERITY[fail_on] else OK


def worst(codes: Iterable[int]) -> int:
    """The one code that stands for several runs; 0 where there are none."""
    met = set(codes)
    return next((code for code in _WORST_FIRST if code in met), OK)
