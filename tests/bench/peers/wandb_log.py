"""The records of a `.wandb` file: a log in LevelDB's format behind a header of seven bytes, protobuf inside.

Blocks of 32 KiB; a record is one fragment or several, each behind checksum, length and type; a block's last bytes
are unused where no header fits into them. Reading ends at the first fragment that was not written out.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_FILE_HEADER = 7
_BLOCK = 32 * 1024
_FRAGMENT = struct.Struct("<IHB")
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: Path) -> Iterator[Any]:
    """Every whole record, in order; none of what was cut off."""
    content = path.read_bytes()
    position, pieces = _FILE_HEADER, b""
    while position + _FRAGMENT.size <= len(content):
        left_in_block = _BLOCK - position % _BLOCK
        if left_in_block < _FRAGMENT.size:
            position += left_in_block
            continue
        _, length, kind = _FRAGMENT.unpack_from(content, position)
        start = position + _FRAGMENT.size
        if not _FULL <= kind <= _LAST or start + length > len(content):
            return
        piece = content[start : start + length]
        position = start + length
        pieces = piece if kind in (_FULL, _FIRST) else pieces + piece
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pieces)
            yield record
