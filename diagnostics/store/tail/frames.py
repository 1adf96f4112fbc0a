"""The bytes in the files of a run's tail, as a writer makes them; `decode` reads them.

A file is `MAGIC`, then frames of `u32 length, u32 crc32(payload)`, little endian, and the payload; its first
byte is the kind. A length of zero is the end: step segments are filled with zeros before they are written to.

    N   JSON {"id": int, "names": [...]}: the names of the scalars of the step records that follow
    S   one step: step, time_s, overhead_s, measured, names id, loss, lr, the named scalars
    T   rows of one table: length of its name, its name, an Arrow IPC stream

A generation of the tail is the step segments and the rows log of one number. Its steps are the S records; where
the rows log holds rows of the table `steps` too, those replace the records of the same steps: they were complete
but for scalars that lay on a device. `decode.read_generation` puts it all together.

Damage and torn writes: a bad frame with nothing valid after it was being written when the process died, and was
never acknowledged; with a valid frame after it, it is damage. A reader of a live file may see a later frame
and not yet an earlier one: it believes in damage once it has read the file a second time.
"""

import json
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache

import pyarrow as pa

MAGIC = b"TDTAIL1\n"
SEGMENT_BYTES = 256 * 1024

HEADER = struct.Struct("<II")
STEP = "<BqddBHdd"


def _nan(bits: int) -> float:
    value: float = struct.unpack("<d", bits.to_bytes(8, "little"))[0]
    return value


# Quiet NaNs whose payloads no arithmetic makes, so that a NaN that was measured stays one.
NULL_BYTES = 0x7FF8_5444_4E55_4C4C.to_bytes(8, "little")
PENDING_BYTES = 0x7FF8_5444_5045_4E44.to_bytes(8, "little")
NULL = _nan(0x7FF8_5444_4E55_4C4C)
"""Stands for no value in a step record."""
PENDING = _nan(0x7FF8_5444_5045_4E44)
"""Stands for a value that lies on a device still; readers see a null."""


def frame(payload: bytes) -> bytes:
    """A payload with its length and checksum before it."""
    return HEADER.pack(len(payload), zlib.crc32(payload)) + payload


def names_frame(identity: int, names: Sequence[str]) -> bytes:
    """The frame that declares a set of scalar names; a segment holds one before the first record that uses it."""
    return frame(b"N" + json.dumps({"id": identity, "names": list(names)}).encode())


@lru_cache(maxsize=256)
def step_struct(scalars: int) -> struct.Struct:
    """Layout of a step record with so many named scalars: kind, step, time_s, overhead_s, measured, names id, doubles."""
    return struct.Struct(f"{STEP}{scalars}d")


def table_frame(table: str, rows: pa.Table) -> bytes:
    """The frame that holds rows of a table; what its columns mean is known from the format and left out."""
    plain = pa.schema([pa.field(one.name, one.type) for one in rows.schema])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, plain) as stream:
        stream.write_table(rows.combine_chunks().cast(plain))
    name = table.encode()
    return frame(b"T" + bytes([len(name)]) + name + sink.getvalue().to_pybytes())
