"""The detectors that need the loss only, on logs of real training runs, beside the rules in use elsewhere.

The logs are no part of the repository (public AlgoPerf submissions, one run a line of JSON: `run`, `loss`,
`grad_norm`); without them the figures are said to be not available.

What has been seen: the form of the loss-spike rule, its shipped edge and the way of freezing were chosen on these
very logs, nearly all of whose crashes are one submission's; `frozen` rows have their edge from the other submissions. A
share of the submissions is in no file here and was never looked at.
"""

import gzip
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diagnostics.errors import DiagnosticsError

from .corpus import CRASH
from .machine import Values
from .real_logs_label import label_of
from .real_logs_rules import ALARMING, BASELINES, Own
from .real_logs_score import Log, Rule, figures, frozen_on_others

if TYPE_CHECKING:
    from .sections import Section

REAL_LOGS = Path(__file__).resolve().parents[3] / "shared" / "data" / "algoperf_dev.jsonl.gz"
"""Beside the repository, where there is one."""
DETECTORS = "**the detectors together**"


def load_logs(path: Path = REAL_LOGS) -> list[Log]:
    """The logs, labelled, in the order of the file; none where there is no such file.

    Raises:
        DiagnosticsError: a line is no such run.
    """
    if not path.is_file():
        return []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [_log(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _log(line: str, where: str) -> Log:
    try:
        found = json.loads(line)
        name, losses, norms = str(found["run"]), _numbers(found["loss"]), _numbers(found["grad_norm"])
    except (ValueError, TypeError, KeyError) as error:
        raise DiagnosticsError(f"{where}: not a run with `run`, `loss` and `grad_norm`: {error}") from error
    if len(losses) != len(norms):
        raise DiagnosticsError(f"{where}: {len(losses)} losses and {len(norms)} gradient norms")
    return Log(name, submission_of(name), losses, norms, label_of(losses))


def submission_of(name: str) -> str:
    """The submission of a trial, by its path: what comes before its study."""
    parts = name.split("/")
    study = next((at for at, part in enumerate(parts) if part.startswith("study_")), len(parts))
    return "/".join(parts[max(0, study - 2) : study])


def _numbers(values: Sequence[float | None]) -> Values:
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def real_logs_document(path: Path = REAL_LOGS) -> dict[str, Any] | None:
    """All figures, ready for JSON; None where the logs are not there.

    `hits`, `failing` and `false_per_1000` are of the detectors at frozen edges, `best_baseline_hits` of the best
    baseline at edges frozen in the same way; a hit is a crash noticed no later than five points after its onset.
    """
    logs = load_logs(path)
    if not logs:
        return None
    own = Own(logs)
    frozen = Rule(DETECTORS, own.at_spike_edge)
    rows = [
        _frozen(logs, frozen),
        _row(
            "the detectors as they ship (chosen on these logs)",
            "shipped",
            logs,
            {log.name: own.shipped(log) for log in logs},
        ),
    ]
    for of_kind in ALARMING:
        alone = {log.name: own.shipped(log, of_kind.kind) for log in logs}
        rows.append(_row(f"`{of_kind.kind}` alone", "shipped", logs, alone))
    for rule in BASELINES:
        if rule.published is not None:
            alarms = {log.name: rule.alarms(log, rule.published) for log in logs}
            rows.append(_row(rule.name, f"{rule.published:g}", logs, alarms))
        rows.append(_frozen(logs, rule))
    crashes = [log.submission for log in logs if log.label.label == CRASH]
    rivals = [row for row in rows if row["threshold"] == "frozen" and row["name"] != DETECTORS]
    return {
        "runs": len(logs),
        "points": sum(len(log.losses) for log in logs),
        "submissions": len({log.submission for log in logs}),
        "labels": dict(sorted(Counter(log.label.label for log in logs).items())),
        "of_one_submission": max(Counter(crashes).values(), default=0),
        "hits": rows[0]["within_5_after"],
        "failing": rows[0]["failing"],
        "false_per_1000": rows[0]["false_per_1000"],
        "best_baseline_hits": max(row["within_5_after"] for row in rivals),
        "rows": rows,
    }


def _frozen(logs: Sequence[Log], rule: Rule) -> dict[str, Any]:
    alarms, edges = frozen_on_others(logs, rule)
    return _row(rule.name, "frozen", logs, alarms) | {
        "edges": {name: edge if math.isfinite(edge) else None for name, edge in edges.items()}
    }


def _row(
    name: str, threshold: str, logs: Sequence[Log], alarms: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    return {"name": name, "threshold": threshold, **figures(logs, alarms)}


def real_logs_section(document: Mapping[str, Any] | None) -> "Section":
    """The figures as a table for the terminal and the README."""
    from .sections import Section  # noqa: PLC0415 - it shows this section among its own

    title = "Logs of real training runs"
    header = (
        "rule",
        "threshold",
        "crashes before the onset",
        "no later than 5 points after",
        "20 points",
        "median lead",
        "false per 1,000 points (95 %)",
        "healthy runs alarmed (95 %)",
    )
    if document is None:
        return Section(
            title, "Not available here: the logs are no part of the repository.", header, [], folded=True
        )
    labels = ", ".join(f"{count} {label}" for label, count in document["labels"].items())
    words = (
        f"{document['runs']} public training logs (AlgoPerf, {document['submissions']} submissions), "
        f"{document['points']:,} points, loss and gradient norm only: {labels}, by a rule on the loss that dates an onset at "
        "the first exceedance. `frozen`: the lowest edge that keeps each of the other submissions within the budget. "
        "The form of the loss-spike rule, the way of freezing and parts of the label were found on these logs, and "
        f"{document['of_one_submission']} of the {document['failing']} crashes are one submission's: the figures are no proof for "
        "others. These rules notice damage: at a bearable rate of false alarms "
        "none of them, and none in use elsewhere, has a median lead above 0."
    )
    return Section(title, words, header, [_cells(row) for row in document["rows"]], folded=True)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["false_per_1000_interval"]
    least, most = row["healthy_share_interval"]
    return (
        row["name"],
        row["threshold"],
        f"{row['before_onset']} of {row['failing']}",
        f"{row['within_5_after']} of {row['failing']}",
        f"{row['within_20_after']} of {row['failing']}",
        f"{row['lead_median']:g}",
        f"{row['false_per_1000']:.3f} ({low:.3f}-{high:.3f})",
        f"{row['healthy_alarmed']} of {row['healthy']} ({least:.0%}-{most:.0%})",
    )
