"""The part files of one folder as a merge sees them: who wrote them, how large they are, and their rows in pieces."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from diagnostics.store.coarse.tables import KEYS, coarse_schema
from diagnostics.store.format import COARSE, SCHEMAS, PartName

# One head's series of a long run then lies in few row groups, and a group is still worth compressing.
ROW_GROUP_ROWS = 16_384
# Bytes that a value takes in memory, by its type on disk; a name is read as a number.
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "BYTE_ARRAY": 4}


class DamagedPartError(Exception):
    """Met when a part cannot be merged: it cannot be read, or its columns do not fit those of the others."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


@dataclass(frozen=True)
class Folder:
    """A folder of part files.

    Attributes:
        path: the folder.
        table: the table, or the one whose coarse table it holds.
        resolution: steps per row of a coarse table, else None.
    """

    path: Path
    table: str
    resolution: int | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """What rows are sorted by before their step; nothing where they keep their order."""
        return KEYS.get(self.table, ())

    @property
    def schema(self) -> pa.Schema:
        """The columns that are known without looking."""
        if self.resolution is None:
            return SCHEMAS[self.table]
        return coarse_schema(self.table, resolution=self.resolution)

    def parts(self) -> list["Part"]:
        """The part files that are there now, those of one writer in the order in which they were written."""
        try:
            names = os.listdir(self.path)  # noqa: PTH208 - names are all that is needed
        except (FileNotFoundError, NotADirectoryError):
            return []
        parts = [Part(self, parsed) for name in names if (parsed := PartName.parse(name)) is not None]
        return sorted(
            parts, key=lambda part: (part.name.attempt, part.name.rank, part.name.number, part.name)
        )


@dataclass(frozen=True)
class Part:
    """A part file."""

    folder: Folder
    name: PartName

    @property
    def path(self) -> Path:
        return self.folder.path / str(self.name)

    @cached_property
    def size(self) -> int:
        """Bytes on disk.

        Raises:
            FileNotFoundError: it was merged meanwhile.
        """
        return self.path.stat().st_size

    @cached_property
    def held(self) -> int:
        """About how many bytes a merge holds of it in memory; 0 for one that is streamed.

        Raises:
            DamagedPartError: it cannot be read.
            FileNotFoundError: it was merged meanwhile.
        """
        if not self.folder.keys:
            return 0
        with opened(self) as file:
            groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
            columns = [group.column(index) for group in groups for index in range(group.num_columns)]
        return sum(column.num_values * _WIDTHS.get(column.physical_type, 16) for column in columns)


def folders(run_dir: Path) -> list[Folder]:
    """Every folder of a run that may hold part files."""
    found = [Folder(run_dir / table, table) for table in SCHEMAS]
    coarse = run_dir / COARSE
    resolutions = sorted(
        int(folder.name) for folder in (coarse.iterdir() if coarse.is_dir() else ()) if folder.name.isdigit()
    )
    return found + [
        Folder(coarse / str(resolution) / table, table, resolution)
        for resolution in resolutions
        for table in KEYS
    ]


def opened(part: Part, dictionaries: Sequence[str] = ()) -> pq.ParquetFile:
    """The part's file.

    Args:
        part: the part.
        dictionaries: columns to read as numbers that stand for their values.

    Raises:
        DamagedPartError: it cannot be read.
        FileNotFoundError: it was merged meanwhile.
    """
    try:
        file = pq.ParquetFile(part.path, read_dictionary=list(dictionaries), page_checksum_verification=True)
        _ = file.schema_arrow.names  # decoded here, so that a damaged name is met here
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DamagedPartError(part.path, str(error)) from error
    return file


def batches(part: Part, dictionaries: Sequence[str] = ()) -> Iterator[pa.Table]:
    """The part's rows, a row group's worth at a time; raises as `opened` does."""
    with opened(part, dictionaries) as file:
        read = file.iter_batches(ROW_GROUP_ROWS, use_threads=False)
        while True:
            try:
                batch = next(read, None)
            except (pa.ArrowException, OSError) as error:
                raise DamagedPartError(part.path, str(error)) from error
            if batch is None:
                return
            yield pa.Table.from_batches([batch])
