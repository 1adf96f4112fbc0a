"""The document as tables and sentences, the same for the terminal and for the README."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .goals import goals
from .real_logs import real_logs_section
from .scoring import HORIZON, HORIZONS

Row = Sequence[str]


@dataclass(frozen=True)
class Section:
    """A table with what is to be said about it; `folded`: for those who want to know more."""

    title: str
    words: str
    header: Row
    rows: Sequence[Row]
    folded: bool = False


FIGURES = (
    "recall (95 %)",
    "lead: median (quartiles)",
    "false per 1,000 steps (95 %)",
    "healthy runs alarmed (95 %)",
)


def sections(document: Mapping[str, Any]) -> list[Section]:
    """In the order in which they are shown."""
    return [
        _goals(document),
        _main(document),
        _grouped(document, "by_family", "Each family, held out", "family"),
        _grouped(document, "by_cause", "Each cause, on held-out families", "cause"),
        _within(document),
        _ablation(document),
        _forecast(document),
        real_logs_section(document.get("real_logs")),
    ]


def _goals(document: Mapping[str, Any]) -> Section:
    corpus = document["corpus"]
    labels = ", ".join(f"{count} {label}" for label, count in corpus["labels"].items())
    return Section(
        "The goals",
        f"{corpus['runs']} runs of {corpus['families']} families and {corpus['causes']} causes, "
        f"{corpus['steps']:,} steps: {labels}. All figures are of families that the thresholds have not seen. "
        "The rules themselves, the care taken in fitting and the edges that are not fitted here were chosen with these runs "
        "in view: expect somewhat less on others.",
        ("goal", "reached", ""),
        [(goal.words, goal.found, "reached" if goal.reached else "missed") for goal in goals(document)],
    )


def _main(document: Mapping[str, Any]) -> Section:
    own, half = document["held_out"], document["half_as_often"]
    rows = [
        ("**the detectors together**", "frozen", *figures(own)),
        ("the detectors, measured every 10 steps", "frozen", *figures(half)),
        (
            "the detectors with the bands that ship (they have seen these runs)",
            "shipped",
            *figures(document["shipped"]),
        ),
    ]
    for row in document["baselines"]:
        if row["published"] is not None:
            rows.append((row["name"], f"{row['threshold']:g}", *figures(row["published"])))
        rows.append((row["name"], "frozen", *figures(row["tuned"])))
    within = own["recall_within"]
    told = ", ".join(f"{within[str(horizon)]:.2f} within {horizon} steps" for horizon in HORIZONS)
    least = own["warned_at_least"]
    return Section(
        "Detectors and baselines",
        f"Recall counts alarms within {HORIZON} steps before the onset. The detectors': {told} before the onset; with a "
        f"lead of at least 10 steps {least['10']:.2f}, of at least 50 {least['50']:.2f}. Of the {own['failing']} failures "
        f"{own['early']} had an alarm only earlier than that, {own['late']} only from the onset on, {own['silent']} none. "
        f"`frozen`: edge set on the other families.",
        ("rule", "threshold", *FIGURES),
        rows,
    )


def figures(values: Mapping[str, Any]) -> Row:
    """The four columns of every table."""
    if not values["failing"]:
        recall, lead = "-", "-"
    else:
        low, high = values["recall_interval"]
        quarter, three = values["lead_quartiles"]
        recall = f"{values['hits']}/{values['failing']} = {values['recall']:.2f} ({low:.2f}-{high:.2f})"
        lead = f"{values['lead_median']:.0f} ({quarter:.0f}-{three:.0f})"
    if not values["quiet_steps"]:
        return recall, lead, "-", "-"
    low, high = values["false_per_1000_interval"]
    false = f"{values['false_per_1000']:.2f} ({low:.2f}-{high:.2f})"
    least, most = values["healthy_share_interval"]
    alarmed = f"{values['healthy_alarmed']} of {values['healthy']} ({least:.0%}-{most:.0%})"
    return recall, lead, false, alarmed


def _grouped(document: Mapping[str, Any], key: str, title: str, column: str) -> Section:
    rows = [(name, *figures(values)) for name, values in document[key].items()]
    return Section(title, "", (column, *FIGURES), rows, folded=True)


def _within(document: Mapping[str, Any]) -> Section:
    rows = [
        (row["name"], *(str(row[key]) for key in ("hits", "first", "only", "late", "false_episodes")))
        for row in document["within"]
    ]
    return Section(
        "What each detector does beside the others",
        "At the frozen edges, on held-out families.",
        (
            "detector",
            "failures warned of",
            "first to warn",
            "only one to warn",
            "only from the onset on",
            "false episodes",
        ),
        rows,
        folded=True,
    )


def _ablation(document: Mapping[str, Any]) -> Section:
    rows = [("all detectors", "", *figures(document["held_out"]))]
    rows += [(row["name"], row["what"], *figures(row)) for row in document["ablation"]]
    return Section(
        "Each signal alone, and all without it",
        "Edges refitted on the other families each time. The last rows are signals that no detector reads.",
        ("signal", "", *FIGURES),
        rows,
        folded=True,
    )


def _forecast(document: Mapping[str, Any]) -> Section:
    forecast = document["forecast"]
    rows = [
        (
            name,
            f"{row['runs']}",
            f"{row['forecasts']} ({row['open']})",
            *(_share(row[key]) for key in ("covered", "early", "late")),
            _number(row["median"]),
            _number(row["width"]),
        )
        for name, row in forecast["rows"].items()
    ]
    return Section(
        "The forecast",
        f"Share of intervals of {forecast['confidence']:.0%} that held the event, calibrated on the other families; "
        "each run weighs the same.",
        (
            "family",
            "runs",
            "forecasts (still open)",
            "covered",
            "earlier",
            "later or never",
            "median steps",
            "high / low",
        ),
        rows,
        folded=True,
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
