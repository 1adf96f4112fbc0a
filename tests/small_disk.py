"""A small disk of its own for a test, as a tmpfs: it can be filled, hidden and made read-only.

Mounting needs a right that root has. Without it a test runs again in a child process, in a namespace of its own,
where it has that right; it is never left out.
"""

import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

_INSIDE = "SMALL_DISK_NAMESPACE"


@contextmanager
def small_disk(folder: Path, size_kib: int) -> Iterator[Path]:
    """A tmpfs over `folder`, which is made where it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    _run("mount", "-t", "tmpfs", "-o", f"size={size_kib}k,mode=755", "tmpfs", folder)
    try:
        yield folder
    finally:
        # Lazily: what a test holds open in it must not keep it there.
        _run("umount", "-l", folder)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Makes a folder of a `small_disk` read-only for every file that is opened from now on."""
    folder.mkdir(exist_ok=True)
    _run("mount", "--bind", folder, folder)
    try:
        # Refused while a file that was just opened is written.
        while subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=False).returncode:
            time.sleep(0.001)
        yield
    finally:
        _run("umount", "-l", folder)


def fill(folder: Path) -> Path:
    """Takes all that is left of the disk that `folder` is on; returns the file that holds it."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return ballast


def mounts(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test, which must take `request`, where it may mount."""

    @functools.wraps(test)
    def wrapped(*arguments: Any, request: pytest.FixtureRequest, **named: Any) -> None:
        if _INSIDE in os.environ or _may_mount():
            test(*arguments, request=request, **named)
            return
        child = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid]
        ended = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", *child],
            check=False,
            capture_output=True,
            text=True,
            cwd=request.config.rootpath,
            env={**os.environ, _INSIDE: "1"},
        )
        assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"

    return wrapped


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


@functools.cache
def _may_mount() -> bool:
    return os.geteuid() == 0 and _mounts_here()


def _mounts_here() -> bool:
    folder = Path("/tmp")  # noqa: S108 - nothing is written there; the mount is gone at once
    probe = folder / f"mount-probe-{os.getpid()}"
    probe.mkdir()
    try:
        with small_disk(probe, 16):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        probe.rmdir()
