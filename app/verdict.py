"""What a page knows of a run's verdict now, without waiting long for it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from diagnostics.report import Report

from .aside import ASIDE
from .data import READER
from .digest import recorded_status
from .judging import judge_apart, judged_at_once, judged_unasked


@dataclass(frozen=True)
class Verdict:
    """The state of the judging.

    Attributes:
        status: the newest one known; `no-data` while there is none.
        report: the full report, or None: only the status that the run itself recorded is known.
        under_way: whether a report is being made.
        to_be_asked_for: whether one is made only when a person asks for it.
        problem: why judging failed, or None.
    """

    status: str
    report: Report | None
    under_way: bool = False
    to_be_asked_for: bool = False
    problem: str | None = None


def verdict_on(run: str, info: Mapping[str, Any], *, asked: bool = False) -> Verdict:
    """The verdict on a run: of a short one the report, of a long one what its run.json says until that is there.

    Args:
        run: path or URI.
        info: its manifest.
        asked: whether a person wants a report that takes long.
    """
    if judged_at_once(info):
        report = READER.report(run)
        return Verdict(report.status, report)
    key = ("verdict", os.fspath(run))
    wanted = asked or judged_unasked(info)
    if wanted:
        ASIDE.ask(key, (info.get("run_id"), info.get("steps"), info.get("state")), partial(judge_apart, run))
    made = ASIDE.result(key)
    recorded = recorded_status(info)
    if isinstance(made, Report):
        # The detectors beside a live run know more of it than a replay that took a while.
        return Verdict((recorded if info.get("state") == "running" else None) or made.status, made)
    return Verdict(
        recorded or "no-data",
        None,
        under_way=wanted and made is None,
        to_be_asked_for=not wanted,
        problem=made,
    )
