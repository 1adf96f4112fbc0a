"""From what a caller asks of a table to what is to be read, with clear words where it cannot be; and back."""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, SupportsIndex

import pyarrow as pa

from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import SCHEMAS, TABLES
from diagnostics.store.parts.read import KEY_COLUMNS, Wanted, conform
from diagnostics.store.reading.step_order import in_step_order, spelled_out

if TYPE_CHECKING:
    import pandas as pd  # a fifth of a second, which most commands can do without


def check_table(name: str) -> None:
    """Refuses a table that there is not.

    Raises:
        DiagnosticsError: there is no such table.
    """
    if name not in TABLES:
        raise DiagnosticsError(f"there is no table {name!r}; the tables are {', '.join(TABLES)}")


def check_columns(columns: Sequence[str] | None) -> None:
    """Refuses columns that ask for nothing.

    Raises:
        DiagnosticsError: the list is empty, or a word instead of a list.
    """
    if isinstance(columns, str):
        raise DiagnosticsError(f"columns={columns!r} is one word; give a list: columns=[{columns!r}]")
    if columns is not None and not columns:
        raise DiagnosticsError(
            "columns=[] asks for nothing; name at least one column, or leave it out for all"
        )


def key_values(
    table: str, *, layer: str | None, head: SupportsIndex | None, parameter: str | None
) -> dict[str, str | int]:
    """The values that key columns must have.

    Raises:
        DiagnosticsError: the table has no such column, or the value is of the wrong type.
    """
    equal: dict[str, str | int] = {}
    for name, value in zip(KEY_COLUMNS, (layer, head, parameter), strict=True):
        if value is None:
            continue
        if name not in SCHEMAS[table].names:
            having = ", ".join(other for other in TABLES if name in SCHEMAS[other].names)
            raise DiagnosticsError(
                f"table {table!r} has no column {name!r}, so {name}={value!r} chooses nothing; {having} have it"
            )
        equal[name] = _head(value) if name == "head" else _name(name, value)
    return equal


def _head(value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise DiagnosticsError(f"head={value!r} is no integer; heads count from 0") from None


def _name(key: str, value: object) -> str:
    if not isinstance(value, str):
        raise DiagnosticsError(f"{key}={value!r} is no string; give the name as the column {key!r} has it")
    return value


def asked(
    table: str,
    columns: Sequence[str] | None,
    start_step: int | None,
    end_step: int | None,
    *,
    layer: str | None = None,
    head: SupportsIndex | None = None,
    parameter: str | None = None,
) -> Wanted:
    """What is to be read for a caller's arguments; see `Run`.

    Raises:
        DiagnosticsError: they cannot be met.
    """
    check_table(table)
    check_columns(columns)
    equal = key_values(table, layer=layer, head=head, parameter=parameter)
    return Wanted(read_columns(table, columns), start_step, end_step, equal)


def read_columns(table: str, columns: Sequence[str] | None) -> list[str] | None:
    """The columns to read for those asked for: with the keys, by which rows are chosen and ordered."""
    if columns is None:
        return None
    keys = [name for name in ("step", *KEY_COLUMNS) if name in SCHEMAS[table].names]
    return list(dict.fromkeys((*columns, *keys)))


def finished(
    pieces: Sequence[pa.Table],
    table: str,
    columns: Sequence[str] | None,
    all_columns: Callable[[str], pa.Schema],
) -> pa.Table:
    """The pieces as one table: in step order, the columns asked for, as the format describes them.

    Args:
        pieces: rows as parts/read.py gives them.
        table: the table's name.
        columns: those asked for.
        all_columns: finds every column that the table has in any file; called where one is not among the pieces.

    Raises:
        DiagnosticsError: there is no such column.
    """
    schema = SCHEMAS[table]
    empty = conform(schema.empty_table(), schema)
    # In pieces without a single row columns may have come from one part and not another.
    rows = in_step_order(pa.concat_tables([*pieces, empty], promote_options="default"))
    if columns is not None:
        rows = _with_columns(rows, table, columns, all_columns).select(list(columns))
    else:
        rows = rows.select([*schema.names, *(name for name in rows.column_names if name not in schema.names)])
    return described(spelled_out(rows), schema)


def described(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with unit and meaning of their columns in the fields' metadata."""
    fields = [schema.field(one.name) if one.name in schema.names else one for one in rows.schema]
    return rows.cast(pa.schema(fields))


def to_frame(rows: pa.Table) -> "pd.DataFrame":
    """The rows in pandas; a head that may be null stays an integer."""
    frame: pd.DataFrame = rows.to_pandas()
    if "head" in rows.column_names and rows.column("head").null_count:
        # pandas turns integers with nulls into floats; through pandas' own type there is no 1.0 for head 1.
        frame["head"] = rows.column("head").to_pandas(types_mapper={pa.int16(): _nullable_int16()}.get)
    return frame


def _nullable_int16() -> "pd.Int16Dtype":
    import pandas  # noqa: PLC0415, ICN001 - see above

    return pandas.Int16Dtype()


def _with_columns(
    rows: pa.Table, table: str, columns: Iterable[str], all_columns: Callable[[str], pa.Schema]
) -> pa.Table:
    missing = [name for name in columns if name not in rows.column_names]
    if missing:
        known = all_columns(table)
        for name in missing:
            if name not in known.names:
                raise DiagnosticsError(
                    f"table {table!r} has no column {name!r}; it has {', '.join(known.names)}"
                )
            rows = rows.append_column(known.field(name), pa.nulls(rows.num_rows, known.field(name).type))
    return rows
