"""`assess`: a run's tables in, a verdict out. Plain data; printing and plotting are done elsewhere."""

import os
from dataclasses import dataclass, field
from typing import Any

from diagnostics.detect.finding import SEVERITIES, STATUSES, Finding
from diagnostics.detect.monitor import Monitor
from diagnostics.detect.replay import blocks_of
from diagnostics.store.read import Run, open_run


@dataclass(frozen=True)
class Report:
    """The verdict on one run.

    Attributes:
        run: the run's name.
        status: `healthy`, `at-risk`, `collapsed`, `diverged` or `no-data`: how the run stands at `step`.
        step: last step judged, None where there is none.
        findings: the worst first; one that was cleared again carries its `last_step`.
        forecast: steps until collapse with an interval and a confidence, or None: nothing is forecast.
        missing: sentences that say what could not be judged, and why.
    """

    run: str
    status: str
    step: int | None
    findings: tuple[Finding, ...] = ()
    forecast: dict[str, Any] | None = None
    missing: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """The object that `diagnostics report --json` prints for one run."""
        return {
            "run": self.run,
            "status": self.status,
            "step": self.step,
            "findings": [finding.to_dict() for finding in self.findings],
            "forecast": self.forecast,
            "missing": list(self.missing),
        }


def assess(run_or_path: Run | str | os.PathLike[str], *, up_to_step: int | None = None) -> Report:
    """Judges a run with the detectors that also run live beside the recorder.

    Args:
        run_or_path: a `Run`, or the path of a run directory.
        up_to_step: judge as if the run had only come this far (inclusive); None: all there is.

    Raises:
        NotARunError: the path holds no run.
        ValueError: `up_to_step` is negative.
    """
    if up_to_step is not None and up_to_step < 0:
        raise ValueError(
            f"up_to_step is {up_to_step}; steps count from 0, give a step of the run or leave it out"
        )
    run = run_or_path if isinstance(run_or_path, Run) else open_run(run_or_path)
    monitor = Monitor(run.info.get("sites") or ())
    for block in blocks_of(run, up_to_step):
        monitor.feed(block)
    missing = [
        *monitor.missing(),
        *(f"data is missing: {name} is damaged and was left out: {why}" for name, why in run.damaged.items()),
    ]
    return Report(
        run=run.name,
        status=monitor.status(),
        step=monitor.step,
        findings=tuple(sorted(monitor.findings(), key=_worst_first)),
        forecast=monitor.forecast,
        missing=tuple(missing),
    )


def _worst_first(finding: Finding) -> tuple[bool, int, int, int]:
    return (
        not finding.active,
        -STATUSES.index(finding.status),
        -SEVERITIES.index(finding.severity),
        finding.first_step,
    )
