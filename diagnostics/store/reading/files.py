"""The files of a run as its readers meet them: consistent while a writer adds, flushes and merges; damage noted."""

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pyarrow as pa

from diagnostics.errors import DamagedDataWarning
from diagnostics.store.format import SCHEMAS
from diagnostics.store.parts.read import Listing, Part, Wanted, list_parts, read_part, shaped
from diagnostics.store.place import Place
from diagnostics.store.reading.tail import Tail, TailRows, read_tail
from diagnostics.store.reading.view import View, first_steps


class RunFiles:
    """Reads one rank's rows of a run directory.

    Args:
        place: the run directory.
        attempt: the attempt to show whole; None: what counts of all.
        rank: the rank.
    """

    def __init__(self, place: Place, attempt: int | None, rank: int) -> None:
        self.place = place
        self.attempt = attempt
        self.rank = rank
        self.damaged: dict[str, str] = {}

    def rows(self, table: str, wanted: Wanted) -> tuple[list[pa.Table], View]:
        """The rows asked for, in pieces of any order, and the view they were chosen by."""
        # The tail first: what is flushed meanwhile is in a part that is listed after.
        tail = self.tail(steps=table == "steps")
        while True:
            listed, view = self.look(table, tail.starts)
            asked = [
                (part, self.asked_of(part.name.attempt, view, wanted)) for part in listed.without_replaced()
            ]
            pieces, gone = self.read_parts(table, SCHEMAS[table], asked)
            if self.is_settled(table, listed, gone):
                break
        left = [one for one in tail.generations if one.number > listed.newest]
        return [*(rows for _, rows in pieces), *self._tail_pieces(table, left, view, wanted)], view

    def tail(self, *, steps: bool) -> Tail:
        """The tail as it is now; see `read_tail`."""
        tail = read_tail(self.place, self.rank, steps=steps)
        for name, why in tail.damage.items():
            self.note(name, why)
        return tail

    def look(self, table: str, tail_starts: Iterable[tuple[int, int]]) -> tuple[Listing, View]:
        """The part files of a table, and which of their rows count.

        Args:
            table: the table.
            tail_starts: attempt and first step of what was in the tail, which must have been read before.
        """
        listed = self.listing(table)
        steps = listed if table == "steps" else self.listing("steps")
        # An attempt's steps rows are on disk before others of the same steps, though perhaps not seen yet.
        names = [part.name for part in (*steps.parts, *(() if table == "events" else listed.parts))]
        return listed, View(first_steps(names, tail_starts), self.attempt)

    def listing(self, folder: str) -> Listing:
        """The part files in a folder of the run; a folder that cannot be listed counts as damaged."""
        try:
            listing = list_parts(self.place / folder, self.rank)
        except OSError as error:
            self.note(folder, str(error))
            return Listing()
        for name in listing.foreign:
            self.note(f"{folder}/{name}", "its name is not one that a Recorder gives")
        return listing

    def read_parts(
        self, folder: str, schema: pa.Schema, asked: Iterable[tuple[Part, Wanted | None]]
    ) -> tuple[list[tuple[Part, pa.Table]], set[str]]:
        """The rows asked for of each part; and the names of parts that were not there any more.

        A part that is damaged has no rows and is noted; one whose name says that it holds none is not opened.
        """
        pieces: list[tuple[Part, pa.Table]] = []
        gone: set[str] = set()
        for part, wanted in asked:
            if wanted is None or not wanted.meets(part.name.first_step, part.name.last_step):
                continue
            try:
                pieces.append((part, read_part(part.place.source(), schema, wanted)))
            except FileNotFoundError:
                gone.add(part.place.name)
            except (pa.ArrowException, OSError) as error:
                self.note(f"{folder}/{part.place.name}", str(error))
        return pieces, gone

    def is_settled(self, folder: str, listed: Listing, gone: set[str]) -> bool:
        """Whether what was read of a folder is all there was; if not, it is to be read again.

        A merge meanwhile may take away files that were listed and not read yet, and add one that was not
        listed. Merging ends, and so does reading again.
        """
        now = self.listing(folder)
        if now.merged != listed.merged:
            return False
        names = {part.place.name for part in now.parts}
        for name in gone & names:
            self.note(f"{folder}/{name}", "it is a link to a file that is not there")
        return gone <= names

    def asked_of(self, attempt: int, view: View, wanted: Wanted) -> Wanted | None:
        """What is asked of an attempt's rows in a view; None: nothing."""
        if not view.shows(attempt):
            return None
        return replace(wanted, end_step=view.last(attempt, wanted.end_step))

    def _tail_pieces(
        self, table: str, generations: Iterable[TailRows], view: View, wanted: Wanted
    ) -> Iterator[pa.Table]:
        for one in generations:
            asked = self.asked_of(one.attempt, view, wanted)
            rows = one.tables.get(table)
            if asked is not None and rows is not None:
                yield asked.chosen(shaped(rows, SCHEMAS[table], wanted.columns))

    def note(self, name: str, reason: str) -> None:
        """Remembers that a file cannot be read, and says so once."""
        if name in self.damaged:
            return
        self.damaged[name] = reason
        warnings.warn(
            f"{self.place / name} is damaged and was skipped, the rest of the run is read: {reason}",
            DamagedDataWarning,
            stacklevel=5,
        )
