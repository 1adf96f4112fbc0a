"""Where the figures go: the terminal, the README between its markers, results.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diagnostics.errors import DiagnosticsError

from .sections import Section

README = Path(__file__).resolve().parents[2] / "README.md"
RESULTS = Path(__file__).resolve().parent / "results.json"
BEGIN, END = "<!-- evaluate:begin -->", "<!-- evaluate:end -->"


def show(some: Sequence[Section], console: Console) -> None:
    """Tables for the terminal."""
    for section in some:
        table = Table(title=section.title, caption=section.words or None, title_justify="left")
        for name in section.header:
            table.add_column(name, overflow="fold")
        for row in section.rows:
            table.add_row(*(cell.replace("**", "") for cell in row))
        console.print(table)


def markdown(some: Sequence[Section]) -> str:
    """What stands between the markers."""
    parts = []
    for section in some:
        lines = [f"| {' | '.join(section.header)} |", "|---" * len(section.header) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in section.rows]
        table = "\n".join(lines)
        body = "\n\n".join(part for part in (section.words, table if section.rows else "") if part)
        if section.folded:
            parts.append(f"<details><summary>{section.title}</summary>\n\n{body}\n\n</details>")
        else:
            parts.append(f"**{section.title}.** {body}")
    return "\n\n".join(parts)


def placed(text: str, region: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """A page, the README or another, with a new region between its markers.

    Raises:
        DiagnosticsError: the markers are not there, once each and in order.
    """
    begin, end = markers
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise DiagnosticsError(
            f"the page needs one {begin} and behind it one {end}: the figures go between them"
        )
    before, rest = text.split(begin)
    after = rest.split(end)[1]
    return f"{before}{begin}\n{region}\n{end}{after}"


def as_json(document: Mapping[str, Any]) -> str:
    """The same document gives the same bytes; the order of keys is that of the rows in the tables."""
    return json.dumps(document, indent=1, allow_nan=False) + "\n"
