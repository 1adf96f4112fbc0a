"""The rows in the files of a run's tail, as readers and those who make part files of them get them."""

import json
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from diagnostics.store.format import SCHEMAS, scalar_field
from diagnostics.store.tail.frames import HEADER, MAGIC, NULL_BYTES, PENDING_BYTES, STEP, step_struct

Row = dict[str, Any]

_DOUBLE = struct.Struct("<d")
_KINDS = re.compile(rb"[NST]")


@dataclass
class TailSteps:
    """The step records of one segment.

    Attributes:
        rows: step, time_s, loss, lr, measured, overhead_s and the scalars that each step has, in the order written.
        pending: steps some of whose scalars lay on a device; those are None in `rows`.
        damage: what could not be read, in words.
        end: where the next frame will begin.
    """

    rows: list[Row] = field(default_factory=list)
    pending: set[int] = field(default_factory=set)
    damage: list[str] = field(default_factory=list)
    end: int = 0


@dataclass
class TailTables:
    """The batches of rows of one rows log.

    Attributes:
        batches: table name and rows, in the order written, columns as the format describes them.
        damage: what could not be read, in words.
        end: where the next frame will begin.
    """

    batches: list[tuple[str, pa.Table]] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    end: int = 0


@dataclass
class Generation:
    """The rows of one generation of the tail.

    Attributes:
        tables: rows by table; a table without rows is absent.
        pending: steps that are in `steps` with nulls for scalars that lay on a device.
        damage: what could not be read, in words.
    """

    tables: dict[str, pa.Table] = field(default_factory=dict)
    pending: set[int] = field(default_factory=set)
    damage: list[str] = field(default_factory=list)


def read_steps(data: bytes, *, whole: bool = True, names: dict[int, list[str]] | None = None) -> TailSteps:
    """The step records in a segment's bytes; nothing in them makes it fail.

    Args:
        data: the file's bytes, or where `whole` is False those from an earlier `end` on.
        whole: whether `data` begins where the file does.
        names: the scalars declared so far, by id; what `data` declares is added. Needed to read on.
    """
    found = TailSteps()
    names = {} if names is None else names
    frames = _Frames(data, whole=whole)
    for kind, payload in frames:
        if kind == b"N":
            declared = _declared(payload)
            if declared is None:
                found.damage.append("a declaration of scalars that is no JSON")
            else:
                names[declared[0]] = declared[1]
        elif kind == b"S":
            _read_step(payload, names, found)
        else:
            found.damage.append("a frame of rows where step records belong")
    found.damage += frames.damage
    found.end = frames.end
    return found


def read_tables(data: bytes, *, whole: bool = True) -> TailTables:
    """The rows in a rows log's bytes; nothing in them makes it fail.

    Args:
        data: the file's bytes, or where `whole` is False those from an earlier `end` on.
        whole: whether `data` begins where the file does.
    """
    found = TailTables()
    frames = _Frames(data, whole=whole)
    for kind, payload in frames:
        batch = _read_table(payload) if kind == b"T" else "a step record where rows belong"
        if isinstance(batch, str):
            found.damage.append(batch)
        else:
            found.batches.append(batch)
    found.damage += frames.damage
    found.end = frames.end
    return found


def read_generation(segments: Iterable[bytes], rows_log: bytes = b"") -> Generation:
    """All rows of one generation: its segments in order of their index, and its rows log (empty where it has none)."""
    found = Generation()
    steps: list[Row] = []
    for data in segments:
        segment = read_steps(data)
        steps += segment.rows
        found.pending |= segment.pending
        found.damage += segment.damage
    log = read_tables(rows_log)
    found.damage += log.damage
    by_table: dict[str, list[pa.Table]] = {}
    for name, batch in log.batches:
        by_table.setdefault(name, []).append(batch)
    completed = {row["step"]: row for batch in by_table.pop("steps", []) for row in batch.to_pylist()}
    if steps or completed:
        found.pending -= completed.keys()
        recorded = {row["step"] for row in steps}
        rows = [completed.get(row["step"], row) for row in steps]
        rows += [row for step, row in completed.items() if step not in recorded]
        found.tables["steps"] = steps_table(rows, scalar_names(rows))
    for name, batches in by_table.items():
        found.tables[name] = pa.concat_tables(batches)
    return found


def scalar_names(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The names in steps rows that are no columns of the contract, in the order met."""
    known = SCHEMAS["steps"].names
    return [name for name in dict.fromkeys(name for row in rows for name in row) if name not in known]


def steps_table(rows: Sequence[Mapping[str, Any]], scalars: Sequence[str]) -> pa.Table:
    """Steps rows in Arrow: the contract's columns, then the scalars as float64; what a row lacks is null."""
    schema = steps_schema(scalars)
    columns = [
        pa.array([row.get(column.name) for row in rows], column.type, from_pandas=False) for column in schema
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def steps_schema(scalars: Sequence[str]) -> pa.Schema:
    """Schema of the table `steps` with these scalars, the recorder's own or the user's."""
    schema = SCHEMAS["steps"]
    for name in scalars:
        schema = schema.append(scalar_field(name))
    return schema


class _Frames:
    """The valid frames in a file's bytes, in order; knows afterwards where they ended and what was damaged."""

    def __init__(self, data: bytes, *, whole: bool) -> None:
        self._data = data
        self._whole = whole
        self.damage: list[str] = []
        self.end = 0

    def __iter__(self) -> Iterator[tuple[bytes, bytes]]:
        data = self._data
        position = len(MAGIC) if self._whole else 0
        if self._whole and not data.startswith(MAGIC):
            # Cut off while it was made, or filled with zeros and not begun.
            if len(data) < len(MAGIC) or not data.strip(b"\0"):
                return
            self.damage.append("the file does not begin as a tail file does")
        self.end = position
        while True:
            payload = _payload_at(data, position)
            if payload is None:
                found = self._next_valid(position + 1)
                if found is None:
                    return
                self.damage.append(f"{found - position} bytes at {position} that are no frame")
                position = found
                continue
            position += HEADER.size + len(payload)
            self.end = position
            yield payload[:1], payload[1:]

    def _next_valid(self, start: int) -> int | None:
        """Where the first valid frame from `start` on begins."""
        if not any(self._data[start:].rstrip(b"\0")):
            return None
        for match in _KINDS.finditer(self._data, start + HEADER.size):
            position = match.start() - HEADER.size
            if _payload_at(self._data, position) is not None:
                return position
        return None


def _payload_at(data: bytes, position: int) -> bytes | None:
    if position + HEADER.size > len(data):
        return None
    length, checksum = HEADER.unpack_from(data, position)
    begin = position + HEADER.size
    if not length or begin + length > len(data):
        return None
    payload = data[begin : begin + length]
    if payload[:1] not in (b"N", b"S", b"T") or zlib.crc32(payload) != checksum:
        return None
    return payload


def _declared(payload: bytes) -> tuple[int, list[str]] | None:
    try:
        told = json.loads(payload)
        return int(told["id"]), [str(name) for name in told["names"]]
    except (ValueError, KeyError, TypeError):
        return None


def _read_step(payload: bytes, names: Mapping[int, Sequence[str]], found: TailSteps) -> None:
    scalars, cut = divmod(len(payload) + 1 - struct.calcsize(STEP), 8)
    if cut or scalars < 0:
        found.damage.append("a step record of a wrong length")
        return
    _, step, time_s, overhead_s, measured, identity, loss, lr, *values = step_struct(scalars).unpack(
        b"S" + payload
    )
    declared = names.get(identity, ())
    if len(declared) != scalars:
        found.damage.append(f"the scalars of step {step}, whose names are not declared")
        declared, values = (), []
    row: Row = {
        "step": step,
        "time_s": time_s,
        "loss": loss,
        "lr": lr,
        "measured": bool(measured),
        "overhead_s": overhead_s,
    }
    row.update(zip(declared, values, strict=True))
    for name, value in row.items():
        if value != value:  # noqa: PLR0124 - only a NaN differs from itself
            bits = _DOUBLE.pack(value)
            if bits == NULL_BYTES:
                row[name] = None
            elif bits == PENDING_BYTES:
                row[name] = None
                found.pending.add(step)
    found.rows.append(row)


def _read_table(payload: bytes) -> tuple[str, pa.Table] | str:
    """Name and rows of a table's frame, or what is wrong with it."""
    length = payload[0] if payload else 0
    name = payload[1 : 1 + length].decode(errors="replace")
    if name not in SCHEMAS:
        return f"rows of a table {name!r}, which there is not"
    try:
        # Bytes of their own: Arrow computes with what begins at an odd address, but complains of it on stderr.
        with pa.ipc.open_stream(pa.py_buffer(payload[1 + length :])) as stream:
            rows = stream.read_all()
        schema = SCHEMAS[name]
        described = (
            steps_schema(scalar_names([dict.fromkeys(rows.column_names)])) if name == "steps" else schema
        )
        return name, rows.cast(described)
    except (pa.ArrowException, ValueError) as error:
        return f"rows of {name} that Arrow cannot read: {error}"
