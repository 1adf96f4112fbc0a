"""`Run.follow`: a table's rows as they come, each handed out once; a read costs what is new, not what is there.

How rows are told apart. Within an attempt the rows of `steps`, `attention`, `spectra` and `updates` come in step
order, and those of one step and key once: what was handed out is kept as spans of steps, so that a part that
only holds rows which came out of the tail before, or a merged part of parts that were read, is not opened.
Events may be of any step. One is known by all that it says, its time included; two events that are alike in every
column, time and message too, count as one if one of them moves from the tail into a part between two reads.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from diagnostics.store.format import SCHEMAS
from diagnostics.store.parts.read import Listing, Part, Wanted, replaced_by, shaped
from diagnostics.store.reading.asked import check_columns, check_table, finished, read_columns
from diagnostics.store.reading.files import RunFiles
from diagnostics.store.reading.spans import Spans
from diagnostics.store.reading.step_order import spelled_out
from diagnostics.store.reading.tail_follow import Followed, TailFollower, steps_rows
from diagnostics.store.reading.view import View
from diagnostics.store.tail.decode import Row


@dataclass(frozen=True)
class News:
    """What came since the last read.

    Attributes:
        rows: new rows, in step order.
        replaces_from: rows of this step and later steps that were handed out before are void: a new attempt
            computes them again. None: they all stand.
    """

    rows: pa.Table
    replaces_from: int | None = None


@dataclass
class _Handed:
    """What was handed out of one attempt.

    Attributes:
        spans: the steps.
        events: how often each event, as its step and a hash of it.
    """

    spans: Spans = field(default_factory=Spans)
    events: Counter[tuple[int, int]] = field(default_factory=Counter)


class Cursor:
    """Hands out the rows of one table as they come. Of one thread at a time.

    Args:
        files: the run's files; attempt and rank are theirs.
        table: the table.
        columns: the columns to hand out, in this order; None: all. A scalar that no row has yet is then missing.
        alive: whether the writer may still be at work.
        all_columns: every column of the table that any file has.

    Raises:
        DiagnosticsError: there is no such table, or `columns` is empty.
    """

    def __init__(
        self,
        files: RunFiles,
        table: str,
        columns: Sequence[str] | None,
        *,
        alive: Callable[[], bool],
        all_columns: Callable[[str], pa.Schema],
    ) -> None:
        check_table(table)
        check_columns(columns)
        self._files = files
        self._table = table
        self._columns = columns
        # An event is known by all of it.
        self._wanted = Wanted(None if table == "events" else read_columns(table, columns))
        self._alive = alive
        self._all_columns = all_columns
        self._known: pa.Schema | None = None
        self._follower = TailFollower(files.place, files.rank, table, files.note)
        self._handed: dict[int, _Handed] = {}
        self._seen: set[str] = set()

    def read(self) -> News:
        """The rows that came since the last read, and from which step on earlier ones are void.

        Raises:
            DiagnosticsError: there is no such column.
        """
        # The tail first: what is flushed meanwhile is in a part that is listed after.
        self._follower.read_on()
        while True:
            listed, view = self._files.look(self._table, self._follower.starts)
            replaces_from = self._void_from(view)
            if replaces_from is not None:
                break
            read = self._read_parts(listed, view)
            if read is not None:
                return News(self._hand_out(read, listed, view))
        self._forget_from(replaces_from)
        again = self.read()
        return News(
            again.rows,
            min(replaces_from, replaces_from if again.replaces_from is None else again.replaces_from),
        )

    def _void_from(self, view: View) -> int | None:
        """The first step that was handed out of an attempt and is hidden now."""
        ends = [
            end
            for attempt, handed in self._handed.items()
            if (end := view.end(attempt)) is not None
            and handed.spans.last is not None
            and handed.spans.last >= end
        ]
        return min(ends, default=None)

    def _forget_from(self, step: int) -> None:
        """Makes all rows from a step on count as not handed out."""
        for handed in self._handed.values():
            handed.spans.cut(step)
            for event in [event for event in handed.events if event[0] >= step]:
                del handed.events[event]
        self._seen.clear()
        self._follower = TailFollower(self._files.place, self._files.rank, self._table, self._files.note)
        self._follower.read_on()

    def _read_parts(self, listed: Listing, view: View) -> list[tuple[Part, pa.Table]] | None:
        """The rows of parts that hold new ones, among them perhaps some that are not; None: to be done again."""
        asked = [(part, self._asked_of(part, view)) for part in listed.without_replaced()]
        pieces, gone = self._files.read_parts(self._table, SCHEMAS[self._table], asked)
        return pieces if self._files.is_settled(self._table, listed, gone) else None

    def _asked_of(self, part: Part, view: View) -> Wanted | None:
        """What is asked of a part; None where it holds nothing new."""
        name, label = part.name, part.place.name
        wanted = self._files.asked_of(name.attempt, view, self._wanted)
        if wanted is None or label in self._seen:
            return None
        spans = self._handed.setdefault(name.attempt, _Handed()).spans
        last = view.last(name.attempt, name.last_step)
        assert last is not None, name
        handed_out = self._table != "events" and spans.holds(name.first_step, last)
        if name.merges and not handed_out:
            replaced = replaced_by(part.place)
            handed_out = bool(replaced) and replaced <= self._seen
            self._seen -= replaced if handed_out else set()
        if handed_out:
            self._seen.add(label)
            return None
        known = None if self._table == "events" else spans.last_of(name.first_step)
        return wanted if known is None else replace(wanted, start_step=known + 1)

    def _hand_out(self, read: Iterable[tuple[Part, pa.Table]], listed: Listing, view: View) -> pa.Table:
        """The new rows among what was read and what lies in the tail; they count as handed out."""
        pieces: list[pa.Table] = []
        for part, rows in read:
            handed = self._handed[part.name.attempt]
            pieces.append(self._new(handed, rows))
            last = view.last(part.name.attempt, part.name.last_step)
            if last is not None and last >= part.name.first_step:
                handed.spans.add(part.name.first_step, last)
            self._seen.add(part.place.name)
        waiting: set[int] = set()
        for (number, attempt), generation in sorted(self._follower.generations.items()):
            if number <= listed.newest or not view.shows(attempt):
                generation.void()
            elif attempt not in waiting:
                pieces.append(self._of_tail(generation, view))
                if generation.waiting:
                    waiting.add(attempt)  # what comes after waits too, so that rows come in order
        if self._files.place.local is not None:
            for handed in self._handed.values():
                handed.spans.close()  # on a disk the parts of an attempt appear in order
        return finished(
            [self._asked_for(piece) for piece in pieces if piece.num_rows],
            self._table,
            self._columns,
            self._schema,
        )

    def _of_tail(self, generation: Followed, view: View) -> pa.Table:
        schema = SCHEMAS[self._table]
        steps: list[Row] = []
        if self._table == "steps":
            unsure = bool(generation.waiting or generation.early)
            steps = generation.complete(alive=not unsure or self._may_complete(generation, view))
            batches = [steps_rows(steps)]
        else:
            batches = [*generation.tables, schema.empty_table()]
        generation.taken(steps)
        wanted = self._files.asked_of(generation.attempt, view, self._wanted)
        assert wanted is not None, generation.attempt
        rows = pa.concat_tables(batches, promote_options="default")
        rows = wanted.chosen(shaped(rows, schema, self._wanted.columns))
        handed = self._handed.setdefault(generation.attempt, _Handed())
        new = self._new(handed, rows)
        if new.num_rows and self._table != "events":
            step_n = new.column("step").to_numpy()
            first = int(step_n.min())
            # They come in order: all there are in between came before.
            generation.taken_from = (
                first if generation.taken_from is None else min(first, generation.taken_from)
            )
            handed.spans.add(generation.taken_from, int(step_n.max()))
        return new

    def _may_complete(self, generation: Followed, view: View) -> bool:
        return generation.attempt >= max(view.starts, default=0) and self._alive()

    def _new(self, handed: _Handed, rows: pa.Table) -> pa.Table:
        """The rows that were not handed out yet."""
        if not rows.num_rows:
            return rows
        if self._table == "events":
            return self._new_events(handed, rows)
        return rows.filter(pa.array(~handed.spans.holding(rows.column("step").to_numpy())))

    def _new_events(self, handed: _Handed, rows: pa.Table) -> pa.Table:
        known = handed.events.copy()
        new = []
        for index, row in enumerate(spelled_out(rows).select(SCHEMAS["events"].names).to_pylist()):
            event = (row["step"], hash(tuple(row.values())))
            if known[event] > 0:
                known[event] -= 1
            else:
                handed.events[event] += 1
                new.append(index)
        if new:
            step_n = rows.column("step").to_numpy()[new]
            handed.spans.add(int(step_n.min()), int(step_n.max()))
        return rows.take(pa.array(new, pa.int64()))

    def _asked_for(self, rows: pa.Table) -> pa.Table:
        names = read_columns(self._table, self._columns) or rows.column_names
        return rows.select([name for name in names if name in rows.column_names])

    def _schema(self, table: str) -> pa.Schema:
        """Every column there is; looked for only where one asked for was not met yet."""
        if self._known is None or not set(self._columns or ()) <= set(self._known.names):
            self._known = self._all_columns(table)
        return self._known
