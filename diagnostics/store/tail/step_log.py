"""Step records on their way to the tail: the training thread writes them, the writer's thread reads them back.

The log is the queue between the two threads. It lies in segments, files of a fixed size that are mapped into
memory: what is put there outlives the process, however it dies, and costs no call of the system. The writer's
thread makes the next segment ahead of need. A record never waits for a disk.
"""

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from diagnostics.store.format import TAIL
from diagnostics.store.tail.decode import Row, read_steps
from diagnostics.store.tail.frames import HEADER, MAGIC, SEGMENT_BYTES, frame, names_frame, step_struct
from diagnostics.store.tail.mapping import mapped
from diagnostics.store.tail.name import TailName

_KIND = ord("S")
# The writer holds the lock for a few instructions; a training thread that was interrupted within them, longer.
_PATIENCE_S = 1.0


class _Layout(NamedTuple):
    """How a step record with certain scalars lies in a segment that has declared their names."""

    identity: int
    struct: Struct
    size: int


class Segment:
    """One file of step records, mapped into memory where the file system can promise the room for it.

    Args:
        folder: the tail.
        name: the file's name; it must not be there yet.
        size: bytes.

    Raises:
        OSError: it could not be made; nothing of it stays.
    """

    def __init__(self, folder: Path, name: TailName, size: int) -> None:
        self.name = name
        self.path = folder / str(name)
        self.size = size
        self.end = len(MAGIC)
        self.layouts: dict[tuple[str, ...], _Layout] = {}
        self._folder = folder
        self._read = 0
        self._names: dict[int, list[str]] = {}
        self._map: mmap.mmap | None = None
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.pwrite(self._file, MAGIC, 0)
            self._map = mapped(self._file, size)
        except OSError:
            self.remove()
            raise
        if self._map is not None:
            os.close(self._file)
            self._file = -1

    def write(self, data: bytes) -> None:
        """Adds a frame; the caller sees to it that it fits."""
        end = self.end + len(data)
        if self._map is not None:
            self._map[self.end : end] = data
        elif os.pwrite(self._file, data, self.end) != len(data):
            # The rest of it would be zeros, which readers take for the end.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self.end = end

    def read_up_to(self, end: int) -> list[Row]:
        """The records since the last call; a faulty one is impossible here, since this process wrote it."""
        begin, self._read = self._read, end
        if begin == end:
            return []
        data = self._map[begin:end] if self._map is not None else os.pread(self._file, end - begin, begin)
        return read_steps(data, whole=begin == 0, names=self._names).rows

    def rename(self, name: TailName) -> None:
        """Gives an unused segment its place in another generation; one that cannot be moved is let go."""
        path = self._folder / str(name)
        try:
            self.path.rename(path)
        except OSError:
            self.close()
            raise
        self.name, self.path = name, path

    def close(self) -> None:
        """Lets the memory go; the file stays."""
        if self._map is not None:
            self._map.close()
            self._map = None
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def remove(self) -> None:
        self.close()
        self.path.unlink(missing_ok=True)


class StepLog:
    """The step records of one attempt that are not in part files yet.

    `append` belongs to the training thread, everything else to the writer's.

    Args:
        run_dir: the run directory, which exists.
        attempt: which attempt at the run this is, counted from 1.
        rank: rank of the process in a distributed job.
        number: number of the first generation.
        segment_bytes: size of a segment.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        attempt: int = 1,
        rank: int = 0,
        number: int = 0,
        segment_bytes: int = SEGMENT_BYTES,
    ) -> None:
        self._folder = run_dir / TAIL
        self._folder.mkdir(exist_ok=True)
        self._tag = (attempt, rank)
        self._bytes = segment_bytes
        # Held for a few instructions only, so that it is no wait; no file is made or read under it. A signal's
        # handler may record or close amid `append`, on the thread that holds it.
        self._lock = threading.RLock()
        self._number = number
        self._segment = self._make(number, 0, segment_bytes)
        self._spare: Segment | None = None
        self._unread = [self._segment]
        self._kept: list[Segment] = []

    def append(
        self,
        step: int,
        time_s: float,
        overhead_s: float,
        measured: bool,  # noqa: FBT001 - the record's fields in their order
        loss: float,
        lr: float,
        names: tuple[str, ...] = (),
        scalars: Sequence[float] = (),
    ) -> None:
        """Puts a step on record: once this returns, it outlives the process.

        Args:
            step: its number.
            time_s: unix time at which it was closed.
            overhead_s: seconds that the recorder took of it.
            measured: whether it was a measured one.
            loss: its loss; `tail.NULL` and `tail.PENDING` stand for what is not there.
            lr: the learning rate, likewise.
            names: names of the scalars.
            scalars: their values, likewise.

        Raises:
            OSError: the segments that were ready are used up, and another cannot be made.
        """
        with self._lock:
            segment = self._segment
            layout = segment.layouts.get(names)
            if layout is None or segment.end + layout.size > segment.size:
                segment, layout = self._room_for(names)
            payload = layout.struct.pack(
                _KIND, step, time_s, overhead_s, measured, layout.identity, loss, lr, *scalars
            )
            segment.write(frame(payload))

    def prepare(self) -> None:
        """Makes the segment that comes next, so that the training thread does not have to."""
        if self._spare is not None:
            return
        name = self._segment.name
        made = self._make(name.number, name.index + 1, self._bytes)
        needed = self._lock.acquire(timeout=_PATIENCE_S)
        if needed:
            needed = self._spare is None and self._segment.name == name
            if needed:
                self._spare = made
            self._lock.release()
        if not needed:  # the training thread was faster
            made.remove()

    def rotate(self, number: int) -> bool:
        """Makes `number` the generation that records go to from now on; False where the log cannot be had now."""
        fresh = self._take_spare()
        if fresh is None:
            fresh = self._make(number, 0, self._bytes)
        else:
            fresh.rename(TailName("steps", number, *self._tag))
        if not self._lock.acquire(timeout=_PATIENCE_S):
            fresh.remove()
            return False
        self._segment = fresh
        self._unread.append(fresh)
        self._lock.release()
        return True

    def read_new(self, before: int | None = None) -> list[Row]:
        """The records that were not read yet, oldest first.

        Args:
            before: only generations of smaller numbers; None: all.

        Returns:
            The rows; none where the log cannot be had now: what is in it stays for the next call, and in the tail.
        """
        if not self._lock.acquire(timeout=_PATIENCE_S):
            return []
        current = self._segment
        ends = [(one, one.end) for one in self._unread if before is None or one.name.number < before]
        self._lock.release()
        rows = []
        for segment, end in ends:
            rows += segment.read_up_to(end)
            if segment is not current:
                segment.close()
                self._unread.remove(segment)
                self._kept.append(segment)
        return rows

    def retire(self, before: int) -> list[Segment]:
        """Hands over the segments of generations of smaller numbers, all of whose records were read."""
        retired = [one for one in self._kept if one.name.number < before]
        self._kept = [one for one in self._kept if one.name.number >= before]
        return retired

    def drop_spare(self) -> None:
        """Gives back the room of the segment that was made ahead."""
        spare = self._take_spare()
        if spare is not None:
            spare.remove()

    def close(self) -> None:
        """Lets everything go; files whose rows are in no part stay."""
        with suppress(OSError):
            self.drop_spare()
        for segment in [*self._unread, *self._kept]:
            empty = segment.end == len(MAGIC)
            segment.close()
            if empty:
                with suppress(OSError):
                    segment.remove()

    def _take_spare(self) -> Segment | None:
        if not self._lock.acquire(timeout=_PATIENCE_S):
            return None
        spare, self._spare = self._spare, None
        self._lock.release()
        return spare

    def _room_for(self, names: tuple[str, ...]) -> tuple[Segment, _Layout]:
        """A segment with room for a record with these scalars, whose names it declares."""
        struct = step_struct(len(names))
        size = HEADER.size + struct.size
        segment = self._segment
        declaration = b"" if names in segment.layouts else names_frame(len(segment.layouts), names)
        if segment.end + len(declaration) + size > segment.size:
            declaration = names_frame(0, names)
            segment = self._next(len(MAGIC) + len(declaration) + size)
        if declaration:
            layout = _Layout(len(segment.layouts), struct, size)
            segment.write(declaration)
            segment.layouts[names] = layout
        return segment, segment.layouts[names]

    def _next(self, least: int) -> Segment:
        name = self._segment.name
        spare, self._spare = self._spare, None
        if spare is not None and (spare.size < least or spare.name.number != name.number):
            spare.remove()
            spare = None
        fresh = spare or self._make(name.number, name.index + 1, max(least, self._bytes))
        self._segment = fresh
        self._unread.append(fresh)
        return fresh

    def _make(self, number: int, index: int, size: int) -> Segment:
        while True:
            # Both threads may make the segment that comes next; a gap in the indices is no harm.
            with suppress(FileExistsError):
                return Segment(self._folder, TailName("steps", number, *self._tag, index), size)
            index += 1
