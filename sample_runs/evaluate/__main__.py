"""`make evaluate`: how early the detectors warn and how often they are wrong, beside the rules in use today.

python -m sample_runs.evaluate                 prints the figures, writes both READMEs and results.json
python -m sample_runs.evaluate --check         exits 1 where they are not those of the present sources
python -m sample_runs.evaluate --write-bands   first fits the shipped bands on all families
"""

import argparse
import json
import sys
from typing import Any

from rich.console import Console

from .bands import bands_document, write_bands
from .corpus import load_corpus
from .detector_page import PAGE, detector_page
from .inputs import inputs_hash
from .proof import fitted_powers, proof
from .real_logs import real_logs_document
from .report import README, RESULTS, as_json, markdown, placed, show
from .scores import detector_channels
from .sections import sections


def main(arguments: list[str] | None = None) -> int:
    """Runs it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sample_runs.evaluate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    parser.add_argument(
        "--write-bands", action="store_true", help="fit and write diagnostics/detect/bands.json first"
    )
    asked = parser.parse_args(arguments)
    console = Console(stderr=True)
    if asked.check:
        return _check(console)
    with console.status("reading the corpus") as status:
        courses = load_corpus()
        channels = detector_channels(courses)
        if asked.write_bands:
            write_bands(bands_document(channels, courses, fitted_powers(channels, courses)))
            channels = detector_channels(courses)
        document = proof(courses, channels, status.update)
        status.update("real logs")
        document["inputs"] = inputs_hash()
        document["real_logs"] = real_logs_document() or _known_real_logs(document["inputs"])
    RESULTS.write_text(as_json(document), encoding="utf-8")
    found = sections(document)
    show(found, Console())
    README.write_text(placed(README.read_text(encoding="utf-8"), markdown(found)), encoding="utf-8")
    PAGE.write_text(detector_page(PAGE.read_text(encoding="utf-8"), document), encoding="utf-8")
    return 0


def _known_real_logs(inputs: str) -> Any:  # noqa: ANN401 - as the JSON has it
    """Where the logs are not at hand: the figures on record, if they are of the very same sources."""
    if not RESULTS.is_file():
        return None
    known = json.loads(RESULTS.read_text(encoding="utf-8"))
    return known.get("real_logs") if known.get("inputs") == inputs else None


def _check(console: Console) -> int:
    """Whether the README shows what results.json says, and that is of the present inputs."""
    if not RESULTS.is_file():
        console.print("sample_runs/evaluate/results.json is missing: run `make evaluate`")
        return 1
    document: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    wrong = []
    if document["inputs"] != inputs_hash():
        wrong.append("the tables, the detectors or the evaluation changed since the figures were made")
    text = README.read_text(encoding="utf-8")
    if placed(text, markdown(sections(document))) != text:
        wrong.append("README.md does not show what results.json says")
    page = PAGE.read_text(encoding="utf-8")
    if detector_page(page, document) != page:
        wrong.append("diagnostics/detect/README.md does not show what results.json says")
    for words in wrong:
        console.print(f"{words}: run `make evaluate`")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
