"""One merge: several part files of one writer become one, with the same rows, in an order that suits readers.

The new file is written under a temporary name, fsynced and renamed; then the folder is fsynced, and only then
are the parts removed that the file names in its metadata (see merged.py). Killed at any point, the run reads
the same as before, and `finish_interrupted` clears up what was left.

Rows of heads and parameters are sorted by them, so that one head's series lies together; rows of steps and
events keep their order and are streamed, however many they are.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from diagnostics.store.format import TEMPORARY_SUFFIX, PartName
from diagnostics.store.parts.file import WRITER_COLUMNS, repeated, sync_folder
from diagnostics.store.parts.folder import ROW_GROUP_ROWS, DamagedPartError, batches, opened
from diagnostics.store.parts.folder import Folder as Folder  # noqa: PLC0414 - found here by those who merge
from diagnostics.store.parts.folder import Part as Part  # noqa: PLC0414 - likewise
from diagnostics.store.parts.folder import folders as folders  # noqa: PLC0414 - likewise
from diagnostics.store.parts.merged import REPLACES_KEY, may_replace, replaced_by
from diagnostics.store.parts.read import misfit

_TEMPORARY_PREFIX = ".merge-"
_TEMPORARY_PREFIX_OF_SCHEMA_1 = ".compact-"
_HEAD_BITS = 15


class StoppedError(Exception):
    """Met when a merge was told to stop; nothing of it is left."""


def merge(parts: Sequence[Part], *, stopped: Callable[[], bool] = lambda: False) -> Path:
    """Merges parts of one folder, attempt and rank into one and removes them.

    Args:
        parts: two or more, in the order in which they were written.
        stopped: asked between row groups; True ends the merge.

    Returns:
        The merged part.

    Raises:
        DamagedPartError: one cannot be merged; all is as it was.
        FileNotFoundError: one is gone; all is as it was.
        StoppedError: `stopped` said so; all is as it was.
        OSError: the disk is full, say.
    """
    folder = parts[0].folder
    schema = _common_schema(parts)
    target = folder.path / str(_merged_name(folder.path, [part.name for part in parts]))
    temporary = target.with_name(f"{_TEMPORARY_PREFIX}{target.name}{TEMPORARY_SUFFIX}")
    rows = _sorted(parts, schema) if folder.keys else _in_order(parts, schema)
    with ExitStack() as undo:
        undo.callback(temporary.unlink, missing_ok=True)
        with temporary.open("wb") as file:
            with pq.ParquetWriter(
                file,
                schema,
                compression="zstd",
                use_dictionary=repeated(schema),
                # Steps go up by the same number all along: as differences they take next to no room.
                column_encoding={"step": "DELTA_BINARY_PACKED"},
                write_page_checksum=True,
            ) as writer:
                for group in _until(stopped, _row_groups(rows)):
                    writer.write_table(group, row_group_size=ROW_GROUP_ROWS)
            file.flush()
            os.fsync(file.fileno())
        undo.pop_all()
    temporary.rename(target)
    # The new name must last before the old ones go: after a power cut, both gone would be the rows gone.
    sync_folder(folder.path)
    for part in parts:
        part.path.unlink(missing_ok=True)
    return target


def finish_interrupted(folder: Folder, *, rank: int | None = None) -> dict[Path, str]:
    """Removes what a killed merge left: unfinished files, and parts beside the merged one that has their rows.

    Args:
        folder: where to look.
        rank: whose files alone; None: all ranks'.

    Returns:
        Merged parts that lie beside parts they stand for and cannot be read, and why; those parts are kept.
    """
    for path in folder.path.glob(f"{_TEMPORARY_PREFIX}*{TEMPORARY_SUFFIX}"):
        name = PartName.parse(path.name.removeprefix(_TEMPORARY_PREFIX).removesuffix(TEMPORARY_SUFFIX))
        if name is not None and rank in (None, name.rank):
            path.unlink(missing_ok=True)
    for path in folder.path.glob(f"{_TEMPORARY_PREFIX_OF_SCHEMA_1}*{TEMPORARY_SUFFIX}"):
        path.unlink(missing_ok=True)
    damaged: dict[Path, str] = {}
    parts = [part for part in folder.parts() if rank in (None, part.name.rank)]
    for merged in parts:
        candidates = [part for part in parts if may_replace(merged.name, part.name)]
        if not candidates:
            continue
        names = replaced_by(merged.path)
        leftovers = [part.path for part in candidates if part.path.name in names]
        if leftovers:
            try:
                _read_through(merged)
            except DamagedPartError as error:
                damaged[error.path] = error.reason
                continue
            for path in leftovers:
                path.unlink(missing_ok=True)
    return damaged


def _merged_name(folder: Path, names: Sequence[PartName]) -> PartName:
    merges = 1 + max(name.merges for name in names)
    while True:
        merged = PartName(
            min(name.first_step for name in names),
            max(name.last_step for name in names),
            max(name.number for name in names),
            names[0].attempt,
            names[0].rank,
            merges,
        )
        if not (folder / str(merged)).exists():
            return merged
        merges += 1


def _read_through(part: Part) -> None:
    """A footer says nothing about the pages, so that only reading all of them shows a part whole."""
    for _ in batches(part):
        pass


def _common_schema(parts: Sequence[Part]) -> pa.Schema:
    """The columns of all parts: the known ones, then the user's in the order in which they came, then the writer's."""
    known = parts[0].folder.schema
    found: dict[str, pa.Field] = {}
    metadata: dict[bytes, bytes] = {}
    for part in parts:
        with opened(part) as file:
            own = file.schema_arrow
        # What readers refuse must not get into a file with what they read.
        why = misfit(own, known)
        if why is not None:
            raise DamagedPartError(part.path, why)
        for one in own:
            if one.name in known.names:
                found[one.name] = known.field(one.name)
                continue
            before = found.get(one.name)
            if before is None or pa.types.is_null(before.type):
                found[one.name] = one
            elif one.type != before.type and not pa.types.is_null(one.type):
                raise DamagedPartError(
                    part.path,
                    f"its column {one.name!r} is {one.type}, that of earlier parts is {before.type}",
                )
        metadata = {**(own.metadata or {}), **metadata}
    writer = [name for name in WRITER_COLUMNS if name in found and found[name].type == pa.int16()]
    order = [name for name in known.names if name in found]
    order += [name for name in found if name not in known.names and name not in writer]
    metadata[REPLACES_KEY] = json.dumps([str(part.name) for part in parts]).encode()
    return pa.schema([found[name] for name in (*order, *writer)], metadata)


def _aligned(part: Part, rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with the columns of `schema`, which are null where the part has none."""
    columns = []
    for one in schema:
        if one.name not in rows.column_names:
            columns.append(pa.nulls(rows.num_rows, one.type))
            continue
        column = rows.column(one.name)
        try:
            if pa.types.is_dictionary(one.type) and not pa.types.is_dictionary(column.type):
                column = column.cast(one.type.value_type).dictionary_encode()
            columns.append(column.cast(one.type))
        except pa.ArrowException as error:
            raise DamagedPartError(part.path, f"column {one.name!r}: {error}") from error
    return pa.table(columns, schema=schema)


def _in_order(parts: Iterable[Part], schema: pa.Schema) -> Iterator[pa.Table]:
    for part in parts:
        for rows in batches(part):
            yield _aligned(part, rows, schema)


def _sorted(parts: Sequence[Part], schema: pa.Schema) -> Iterator[pa.Table]:
    """All rows, by layer, head and step, or by parameter and step; a row group's worth at a time."""
    keys = [key for key in parts[0].folder.keys if key in schema.names]
    # Names as numbers: they are most of a row otherwise, and slow to sort by.
    coded = schema
    for index, one in enumerate(schema):
        if one.name in keys and pa.types.is_string(one.type):
            coded = coded.set(index, pa.field(one.name, pa.dictionary(pa.int32(), pa.string())))
    names = [one.name for one in coded if pa.types.is_dictionary(one.type)]
    pieces = [_aligned(part, rows, coded) for part in parts for rows in batches(part, names)]
    if not pieces:
        return
    table = pa.concat_tables(pieces).unify_dictionaries().combine_chunks()
    del pieces
    order = _order(table, keys)
    for start in range(0, len(order), ROW_GROUP_ROWS):
        yield table.take(order[start : start + ROW_GROUP_ROWS]).cast(schema)


def _order(table: pa.Table, keys: Sequence[str]) -> pa.Array:
    code_n = np.zeros(table.num_rows, np.int64)
    for key in keys:
        column = table.column(key).combine_chunks()
        if pa.types.is_dictionary(column.type):
            names = column.dictionary.to_pylist()
            rank = np.empty(len(names) + 1, np.int64)
            rank[sorted(range(len(names)), key=lambda index: names[index])] = np.arange(len(names))
            rank[-1] = len(names)
            code_n = rank[column.indices.fill_null(-1).to_numpy()]
        else:
            code_n = (code_n << _HEAD_BITS) | column.fill_null(0).to_numpy().astype(np.int64)
    return pa.array(np.lexsort((table.column("step").to_numpy(), code_n)))


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The rows of the tables, in pieces of a row group each."""
    waiting: list[pa.Table] = []
    rows = 0
    for table in tables:
        waiting.append(table)
        rows += table.num_rows
        if rows >= ROW_GROUP_ROWS:
            whole = pa.concat_tables(waiting)
            full = rows - rows % ROW_GROUP_ROWS
            for start in range(0, full, ROW_GROUP_ROWS):
                yield whole.slice(start, ROW_GROUP_ROWS)
            waiting = [whole.slice(full)]
            rows -= full
    if rows:
        yield pa.concat_tables(waiting)


def _until(stopped: Callable[[], bool], groups: Iterable[pa.Table]) -> Iterator[pa.Table]:
    for group in groups:
        if stopped():
            raise StoppedError
        yield group
