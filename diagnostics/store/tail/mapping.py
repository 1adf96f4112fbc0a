"""Files in memory, where that is safe for a process that must not die of its disk."""

import errno
import mmap
import os
from pathlib import Path

# Writing to a mapped page of a file whose store fails ends the process, where a call would give an error to be
# caught. So only disks of this machine are mapped; a server that goes away is met with such an error.
_OF_THIS_MACHINE = frozenset(
    ("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "zfs", "tmpfs", "ramfs", "overlay", "bcachefs")
)
_MOUNTS = Path("/proc/self/mountinfo")
_NOT_SUPPORTED = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


def mapped(file: int, size: int) -> mmap.mmap | None:
    """The file in memory, filled with zeros; None where that cannot be had or is not safe.

    Args:
        file: an open descriptor.
        size: bytes, for which the file system promises the room: without that promise a full disk would end the
            process at a write to memory.

    Raises:
        OSError: the disk is full, say.
    """
    allocate = getattr(os, "posix_fallocate", None)
    if allocate is None or file_system(file) not in _OF_THIS_MACHINE:
        return None
    try:
        allocate(file, 0, size)
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return None
        raise
    try:
        # Touched here, so that the training thread does not meet the pages one by one.
        return mmap.mmap(file, size, flags=mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
    except (OSError, ValueError):
        return None


def file_system(file: int) -> str | None:
    """Type of the file system that an open file lies on; None where the system does not tell."""
    try:
        path = Path(f"/proc/self/fd/{file}").readlink()
        mounts = _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found = (-1, "")
    for mount in mounts:
        # 36 35 98:0 /root /mount/point options [optional fields] - type source options
        before, _, after = mount.partition(" - ")
        point = Path(before.split()[4].replace("\\040", " "))
        # Of two at one point the later one lies on top.
        if path.is_relative_to(point) and len(point.parts) >= found[0]:
            found = (len(point.parts), after.split()[0])
    return found[1] or None
