"""Tables of one look, and the goals of the issue with what came of them."""

from dataclasses import dataclass, field

from rich.table import Table


@dataclass
class Goals:
    """Goals, in the order they were measured."""

    lines: list[tuple[str, str, bool | None]] = field(default_factory=list)

    def add(self, goal: str, measured: str, *, met: bool | None) -> None:
        """`met` of None: it could not be measured."""
        self.lines.append((goal, measured, met))

    def table(self) -> Table:
        shown = table("goals", ("goal", "measured", ""))
        words = {True: "met", False: "MISSED", None: "not measured"}
        for goal, measured, met in self.lines:
            shown.add_row(goal, measured, words[met])
        return shown


def table(title: str, columns: tuple[str, ...]) -> Table:
    shown = Table(title=title)
    for column in columns:
        shown.add_column(column)
    return shown
