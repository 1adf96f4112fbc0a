"""Writing one part file so that a reader or a kill meets it whole or not at all."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diagnostics.store.format import TEMPORARY_SUFFIX, PartName

_MEANINGS = {
    "attempt": "which attempt at the run recorded the row, counted from 1, which is also where the column is absent",
    "rank": "rank of the process that recorded the row; 0 where the column is absent",
}
WRITER_COLUMNS = tuple(_MEANINGS)
"""At the end of files that a later attempt or another rank than 0 wrote: absent, they stand for 1 and 0."""


def writer_field(column: str) -> pa.Field:
    """One of `WRITER_COLUMNS` with its unit and meaning."""
    return pa.field(column, pa.int16(), metadata={"unit": "", "meaning": _MEANINGS[column]})


def write_part(folder: Path, name: PartName, rows: pa.Table) -> None:
    """Writes rows under a part's name; synced, and so is the folder.

    Args:
        folder: of the table; made where it is missing.
        name: says of which attempt and rank the rows are, which the file's columns then say too.
        rows: with a column `step`.

    Raises:
        OSError: it could not be written; nothing of it stays.
        pyarrow.ArrowException: likewise.
    """
    for column, value, usual in zip(WRITER_COLUMNS, (name.attempt, name.rank), (1, 0), strict=True):
        if value != usual:
            values = pa.array(np.full(rows.num_rows, value, np.int16))
            rows = rows.append_column(writer_field(column), values)
    folder.mkdir(exist_ok=True)
    path = folder / str(name)
    temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
    try:
        with temporary.open("wb") as file:
            # Without checksums a flipped bit in a page is a made-up number.
            pq.write_table(
                rows,
                file,
                compression="zstd",
                use_dictionary=repeated(rows.schema),
                write_page_checksum=True,
            )
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, pa.ArrowException):
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(folder)


def repeated(schema: pa.Schema) -> list[str]:
    """Columns of few distinct values, which a dictionary shortens; for numbers that differ it is wasted work."""
    return [
        one.name
        for one in schema
        if pa.types.is_string(one.type) or pa.types.is_int16(one.type) or pa.types.is_int32(one.type)
    ]


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder outlast a power cut, where the file system knows how."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
