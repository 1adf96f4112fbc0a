"""Prints the zoo as a markdown table: `python tests/zoo/table.py [part of a name]`.

Exactness is the largest error over all heads of an architecture: of a singular value relative to its head's
largest, of an entropy in nats, of the largest logit relative to it. Neutral says whether two training steps with
dropout have the same bits with and without the recorder.
"""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zoo_case import Case, MissingLibraryError
from zoo_models import CASES
from zoo_run import Recorded, attention_error, differences, largest_logit, record, spectra_error, twins

_HEAD = (
    "architecture", "library", "sites", "heads / key heads x size", "layout found", "flags", "spectra", "entropy, nats",
    "logit", "neutral",
)  # fmt: skip


def main(wanted: str) -> None:
    print(f"| {' | '.join(_HEAD)} |")
    print(f"|{'---|' * len(_HEAD)}")
    for case in CASES:
        if wanted.lower() in f"{case.library}: {case.name}".lower():
            print(f"| {' | '.join(_row(case))} |", flush=True)


def _row(case: Case) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as folder:
        try:
            recorded = record(case, Path(folder) / "exact")
        except MissingLibraryError as error:
            return (case.name, case.library, str(error), *[""] * (len(_HEAD) - 3))
        neutral = "yes" if not differences(*twins(case, Path(folder) / "twins")) else "no"
    if not recorded.expected:
        said = recorded.refused or f"none, {len(recorded.sites.skipped)} skipped"
        return (
            case.name,
            case.library,
            "0",
            "",
            "no attention" if recorded.refused else said,
            "",
            "",
            "",
            "",
            neutral,
        )
    sites = recorded.sites
    return (
        case.name,
        case.library,
        f"{len(sites)} of {len(recorded.expected)}"
        if len(sites) != len(recorded.expected)
        else str(len(sites)),
        _each(f"{site.heads} / {site.kv_heads} x {site.head_dim}" for site in sites),
        _each(site.layout for site in sites),
        _each(flag for site in sites for flag in site.flags),
        _number(max(spectra_error(recorded, name) for name in recorded.single)),
        _number(max(_entropy_error(recorded, name) for name in recorded.expected)),
        _number(
            max(
                attention_error(recorded, name, "max_logit") / largest_logit(recorded, name)
                for name in recorded.expected
            )
        ),
        neutral,
    )


def _entropy_error(recorded: Recorded, name: str) -> float:
    return max(attention_error(recorded, name, column) for column in ("entropy", "entropy_min"))


def _each(values: Iterable[str]) -> str:
    """Distinct values in order of appearance."""
    return "; ".join(dict.fromkeys(values))


def _number(value: float) -> str:
    return "not observed" if value == float("inf") else f"{value:.0e}"


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
