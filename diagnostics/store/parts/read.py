"""One table's part files: which there are, and one of them read no further than is asked for."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from diagnostics.store.format import PartName
from diagnostics.store.parts.merged import REPLACES_KEY, may_replace
from diagnostics.store.place import Place

# Names that come again in every row: read as numbers, which sort and compare fast.
NAMES = ("layer", "parameter")
KEY_COLUMNS = ("layer", "head", "parameter")
ENCODED = pa.dictionary(pa.int32(), pa.string())
# Who wrote a row. A column of another type is a scalar of the user's.
_WRITER = {"attempt": pa.int16(), "rank": pa.int16()}


@dataclass(frozen=True)
class Part:
    """A part file: what its name says, and where it lies."""

    name: PartName
    place: Place


@dataclass(frozen=True)
class Listing:
    """The part files in a table's folder.

    Attributes:
        parts: those of the rank, in the order in which they were written.
        foreign: files that end in .parquet and are not named as a part is.
    """

    parts: tuple[Part, ...] = ()
    foreign: tuple[str, ...] = ()

    @property
    def merged(self) -> frozenset[str]:
        return frozenset(part.place.name for part in self.parts if part.name.merges)

    @property
    def newest(self) -> int:
        """The largest flush number that has a part; -1 without one."""
        return max((part.name.number for part in self.parts), default=-1)

    def without_replaced(self) -> list[Part]:
        """The parts that are to be read: those that no merged part stands for."""
        replaced: set[str] = set()
        for part in self.parts:
            # Only a merge that is under way, or was killed, leaves the old parts beside the new one.
            if part.name.merges and any(may_replace(part.name, other.name) for other in self.parts):
                replaced |= replaced_by(part.place)
        return [part for part in self.parts if part.place.name not in replaced]


def replaced_by(part: Place) -> frozenset[str]:
    """Names of the parts that a merged part stands for; none where it cannot be read, as they then still count."""
    try:
        with pq.ParquetFile(part.source()) as file:
            metadata = file.metadata.metadata or {}
        names = json.loads(metadata.get(REPLACES_KEY, b"[]"))
    except (pa.ArrowException, OSError, ValueError):
        return frozenset()
    listed = names if isinstance(names, list) else []
    return frozenset(str(name) for name in listed) - {part.name}


def list_parts(folder: Place, rank: int) -> Listing:
    """The part files of one rank in a table's folder.

    Raises:
        OSError: the folder may not be listed.
    """
    parts: list[Part] = []
    foreign: list[str] = []
    for entry in folder.entries():
        name = PartName.parse(entry.name)
        if name is None:
            if entry.name.endswith(".parquet") and not entry.name.startswith("."):
                foreign.append(entry.name)
        elif name.rank == rank:
            parts.append(Part(name, folder / entry.name))
    parts.sort(key=lambda part: (part.name.attempt, part.name.number, part.name.first_step))
    return Listing(tuple(parts), tuple(foreign))


@dataclass(frozen=True)
class Wanted:
    """What is asked of a table.

    Attributes:
        columns: to be read (None: all), those that `equal` names and the step among them.
        start_step: first step, inclusive.
        end_step: last step, inclusive.
        equal: value that a key column must have.
    """

    columns: Sequence[str] | None = None
    start_step: int | None = None
    end_step: int | None = None
    equal: Mapping[str, str | int] = field(default_factory=dict)

    def meets(self, first_step: int, last_step: int) -> bool:
        """Whether rows of these steps may be among what is asked for."""
        return (self.end_step is None or first_step <= self.end_step) and (
            self.start_step is None or last_step >= self.start_step
        )

    def chosen(self, rows: pa.Table) -> pa.Table:
        """The rows asked for."""
        conditions = [pc.field(name) == value for name, value in self.equal.items()]
        if self.start_step is not None:
            conditions.append(pc.field("step") >= self.start_step)
        if self.end_step is not None:
            conditions.append(pc.field("step") <= self.end_step)
        for condition in conditions:
            rows = rows.filter(condition)
        return rows


def read_part(source: Any, schema: pa.Schema, wanted: Wanted) -> pa.Table:  # noqa: ANN401 - see Place.source
    """The rows asked for of one part; row groups and columns that hold none of them are not read.

    Args:
        source: what `Place.source` gives.
        schema: columns of the table as the format has them.
        wanted: what is asked for.

    Raises:
        FileNotFoundError: there is no such file (any more).
        OSError: it cannot be read.
        pyarrow.ArrowException: what it holds is not a part of this table.
    """
    try:
        with _opened(source, schema) as file:
            held = _data_schema(file.schema_arrow)
            why = misfit(held, schema)
            if why is not None:
                raise pa.ArrowInvalid(why)
            columns = [name for name in wanted.columns or held.names if name in held.names]
            groups = _groups(file.metadata, wanted)
            if not groups:
                rows = held.empty_table().select(columns)
            else:
                rows = file.read_row_groups(groups, columns=columns)
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"it holds a name that is no text: {error}") from error
    return wanted.chosen(conform(rows.select(columns), schema))


def misfit(held: pa.Schema, schema: pa.Schema) -> str | None:
    """Why a file with these columns is no part of a table; None where it may be one.

    A recorder writes every column of a table, those that hold nothing included. One that is missing beside one
    that is not known says that the file is another table's, or that a name in its footer, which no checksum
    guards, is damaged: the column would be null, and another made up.

    Args:
        held: columns of the file.
        schema: columns of the table as the format has them.
    """
    missing = [name for name in schema.names if name not in held.names]
    unknown = [one for one in held if one.name not in schema.names and _WRITER.get(one.name) != one.type]
    keys = [name for name in missing if name in ("step", *KEY_COLUMNS)]
    if keys:
        return f"it has no column {keys[0]!r}"
    if missing and unknown:
        return f"it has no column {missing[0]!r}, but one {unknown[0].name!r}"
    words = [one.name for one in unknown if pa.types.is_string(one.type)]
    if words and "measured" in schema.names:
        return f"its column {words[0]!r} holds words, scalars are numbers"
    return None


def read_schema(source: Any, schema: pa.Schema) -> pa.Schema:  # noqa: ANN401 - see Place.source
    """Columns of a part as readers see them, from its footer; raises as `read_part` does."""
    try:
        with _opened(source, schema) as file:
            return conform(_data_schema(file.schema_arrow).empty_table(), schema).schema
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"it holds a name that is no text: {error}") from error


def _opened(source: Any, schema: pa.Schema) -> pq.ParquetFile:  # noqa: ANN401 - see Place.source
    options = {"pre_buffer": not isinstance(source, str), "page_checksum_verification": True}
    names = [name for name in NAMES if name in schema.names]
    try:
        return pq.ParquetFile(source, read_dictionary=names, **options)
    except KeyError:  # it has no such column, which is judged by whoever reads it
        return pq.ParquetFile(source, **options)


def conform(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the types of `schema`, names as numbers, a column it does not know as it is.

    Raises:
        pyarrow.ArrowException: a column does not have the type it should.
    """
    scalars = pa.float64() if "measured" in schema.names else None
    columns: dict[str, pa.ChunkedArray] = {}
    for name, column in zip(rows.column_names, rows.columns, strict=True):
        target = schema.field(name).type if name in schema.names else scalars or column.type
        if target == pa.string() and name in NAMES:
            if column.type != ENCODED:
                column = column.cast(pa.string()).dictionary_encode()  # noqa: PLW2901 - the same column
            columns[name] = column
        else:
            columns[name] = column if column.type == target else column.cast(target)
    return pa.table(columns) if columns else rows


def shaped(rows: pa.Table, schema: pa.Schema, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows as they lie in the tail as `read_part` gives those of a part: without the columns that say who wrote them."""
    held = _data_schema(rows.schema).names
    return conform(rows.select([name for name in columns or held if name in held]), schema)


def _data_schema(schema: pa.Schema) -> pa.Schema:
    return pa.schema([one for one in schema if _WRITER.get(one.name) != one.type])


def _groups(metadata: pq.FileMetaData, wanted: Wanted) -> list[int]:
    """Row groups that may hold rows asked for, as far as their statistics tell."""
    at = {metadata.schema.column(index).path: index for index in range(metadata.num_columns)}
    ranges: list[tuple[int, Any, Any]] = [
        (at[name], value, value) for name, value in wanted.equal.items() if name in at
    ]
    if wanted.start_step is not None or wanted.end_step is not None:
        ranges.append((at["step"], wanted.start_step, wanted.end_step))
    return [index for index in range(metadata.num_row_groups) if _may_hold(metadata.row_group(index), ranges)]


def _may_hold(group: pq.RowGroupMetaData, ranges: Iterable[tuple[int, Any, Any]]) -> bool:
    for column, low, high in ranges:
        statistics = group.column(column).statistics
        # A file of another tool may hold another type here; that is met when its rows are read.
        if (
            statistics is None
            or not statistics.has_min_max
            or not isinstance(statistics.min, str if isinstance(low, str) else int)
        ):
            continue
        if (low is not None and statistics.max < low) or (high is not None and statistics.min > high):
            return False
    return True
