"""The verdict on a run too long to be judged while a page waits: by a process of its own, at leisure.

Judging replays every measured step. A process apart leaves the server's memory and its pages alone.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from diagnostics.detect.finding import Finding
from diagnostics.report import Report

from .launch import dashboard_environment

# Measured: about this long per row of attention and spectra, and per measured step, on one core.
_ROW_S, _FRAME_S = 1.1e-6, 1.5e-4
_AT_ONCE_S = 0.5
_MOST_ROWS_UNASKED = 5_000_000
_NICE = 10


def rows_judged(info: Mapping[str, Any]) -> int:
    """About how many rows judging the run reads."""
    heads = sum(int(site.get("heads") or 0) for site in info.get("sites") or [])
    return int(info.get("steps") or 0) + 2 * heads * _measured(info)


def judged_at_once(info: Mapping[str, Any]) -> bool:
    """Whether a page may wait for the verdict."""
    return _ROW_S * rows_judged(info) + _FRAME_S * _measured(info) <= _AT_ONCE_S


def judged_unasked(info: Mapping[str, Any]) -> bool:
    """Whether judging is started without being asked for: beyond that it takes a minute and gigabytes of memory."""
    return rows_judged(info) <= _MOST_ROWS_UNASKED


def judge_apart(run: str) -> Report | str:
    """The verdict, from a process of its own; why there is none, where there is none."""
    command = [sys.executable, "-m", "diagnostics", "report", run, "--json"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dashboard_environment()
    ) as judge:
        # What a person watches must not slow down a training beside it.
        with suppress(OSError, AttributeError):
            os.setpriority(os.PRIO_PROCESS, judge.pid, _NICE)
        document, complaints = judge.communicate()
    try:
        (values,) = json.loads(document)["runs"]
    except (ValueError, KeyError):
        return complaints.strip() or f"judging ended with code {judge.returncode}"
    return Report(
        run=values["run"],
        status=values["status"],
        step=values["step"],
        findings=tuple(Finding.from_dict(finding) for finding in values["findings"]),
        forecast=values["forecast"],
        missing=tuple(values["missing"]),
    )


def _measured(info: Mapping[str, Any]) -> int:
    return int(info.get("steps") or 0) // max(1, int(info.get("every") or 1))
