"""What is measured reads as it is, and what is text stays text."""

import math

import pytest

from diagnostics.app.run_info import overhead_sentence
from diagnostics.app.wording import BADGES, ago, evidence, number, plain, prose, verdict
from diagnostics.detect.finding import STATUSES, Finding
from diagnostics.report import Report
from diagnostics.store.manifest import STATES


def finding(**changes: object) -> Finding:
    whole = {"kind": "loss-stall", "severity": "warning", "layer": None, "head": None, "first_step": 7}
    return Finding(**{**whole, **changes})  # type: ignore[arg-type]


def test_every_state_and_status_has_a_symbol_besides_its_colour() -> None:
    assert {*STATES, *STATUSES} <= set(BADGES)
    assert all(badge.symbol for badge in BADGES.values())


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "not observed"),
        (math.nan, "not observed"),
        (12345, "12,345"),
        (0.123456, "0.1235"),
        ("above 2", "above 2"),
    ],
)
def test_numbers_read_as_measured_or_not_observed(value: object, shown: str) -> None:
    assert number(value) == shown


def test_module_paths_are_no_markdown() -> None:
    assert plain("a_b*c[0]") == r"a\_b\*c\[0\]"


def test_code_stays_code_and_a_lone_backtick_stays_a_backtick() -> None:
    assert prose("run_a: `x_y --z`") == r"run\_a\: `x_y --z`"
    assert prose("a ` b") == r"a \` b"


def test_the_healthy_band_stands_with_its_number() -> None:
    assert (
        evidence({"entropy": 0.5, "rank": 2, "entropy_healthy": "above 1"})
        == "entropy 0.5 (healthy: above 1) · rank 2"
    )


def test_the_verdict_is_the_worst_active_finding() -> None:
    cleared = finding(last_step=9, message="the loss stalled")
    assert verdict(Report("r", "no-data", None)) == "There is no data to judge yet."
    assert (
        verdict(Report("r", "healthy", 1000)) == "No sign of a training pathology (judged up to step 1,000)."
    )
    assert "1 earlier finding cleared again" in verdict(Report("r", "healthy", 10, (cleared,)))
    active = finding(message="the loss stalls")
    assert verdict(Report("r", "at-risk", 10, (active, cleared))) == "The loss stalls (judged up to step 10)"
    assert verdict(Report("r", "at-risk", None, (finding(),))) == "Loss-stall, since step 7"


def test_overhead_is_the_recorders_share_of_the_wall_time() -> None:
    assert overhead_sentence((0.4, 4.0)) == "Recorder overhead: 0.4 s of 4 s wall time, 10.00 %."
    assert "not observed" in overhead_sentence(None)
    assert "not observed" in overhead_sentence((0.0, 0.0))


def test_times_read_as_people_say_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 100_000.0)
    assert [ago(100_000.0 - s) for s in (5, 120, 7200, 90_000)] == [
        "5 s ago",
        "2 min ago",
        "2 h ago",
        "1 d ago",
    ]
    assert ago(None) == "not known"
