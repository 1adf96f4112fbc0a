"""Where a run lies: a local folder, or a URI that pyarrow can read. All readers of a run go through `place`.

Local paths are read by the standard library alone. pyarrow.fs, which brings a client for every object store,
is imported when the first URI is met.
"""

import os
import re
import stat
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

import pyarrow as pa

from diagnostics.errors import NotARunError

# One letter before "://" would be a drive of Windows.
_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")

_SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs", "file")
_ADVICE = {
    "s3": "set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_DEFAULT_REGION, and AWS_ENDPOINT_URL for a store "
    "that is not Amazon's",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS to the file of a service account, or log in with gcloud",
    "abfs": "write abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PATH and set AZURE_CLIENT_ID, AZURE_TENANT_ID "
    "and AZURE_CLIENT_SECRET",
    "hdfs": "set HADOOP_HOME, JAVA_HOME and CLASSPATH so that libhdfs finds its files",
}
_FAMILY = {"gcs": "gs", "abfss": "abfs", "viewfs": "hdfs"}


class UnreachableError(NotARunError, OSError):
    """Met when a store behind a URI cannot be reached: no such bucket, no credentials, no network.

    Both of its bases are meant: to a program it is a path that is no run, to a reader of one file of many it is
    an input that failed.
    """


@dataclass(frozen=True)
class Entry:
    """What a listing says of one file or folder.

    Attributes:
        name: its name in the folder listed.
        is_dir: whether it is a folder.
        size: in bytes; 0 for a folder.
        mtime_ns: last change, ns since 1970; 0 where the store does not say.
    """

    name: str
    is_dir: bool
    size: int
    mtime_ns: int


class Place(ABC):
    """A file or folder, local or behind a URI. Made by `place`; `/` leads to what lies inside."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Last part of the path."""

    @property
    @abstractmethod
    def local(self) -> Path | None:
        """The path, where the place lies on this machine."""

    @abstractmethod
    def __truediv__(self, name: str | os.PathLike[str]) -> "Place": ...

    @abstractmethod
    def entries(self, *, recursive: bool = False) -> list[Entry]:
        """What lies in the folder, by name; empty where there is no such folder.

        Args:
            recursive: list what lies in its folders as well; names are then relative to this place, with `/`.

        Raises:
            OSError: it may not be listed, or is a file.
        """

    @abstractmethod
    def read_bytes(self, start: int = 0) -> bytes:
        """The file's content from byte `start` on.

        Raises:
            FileNotFoundError: there is no such file.
            OSError: it may not be read.
        """

    @abstractmethod
    def source(self) -> Any:  # noqa: ANN401 - a path or a file object, whatever pyarrow.parquet.ParquetFile takes
        """What `pyarrow.parquet.ParquetFile` takes.

        Raises:
            FileNotFoundError: there is no such file (or later, when the source is opened).
        """

    @abstractmethod
    def is_dir(self) -> bool:
        """Whether there is a folder here."""


@dataclass(frozen=True, repr=False)
class LocalPlace(Place):
    """A file or folder of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"place({str(self.path)!r})"

    def __truediv__(self, name: str | os.PathLike[str]) -> "LocalPlace":
        return LocalPlace(self.path / name)

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def local(self) -> Path:
        return self.path

    def entries(self, *, recursive: bool = False) -> list[Entry]:
        found: list[Entry] = []
        waiting = [""]
        while waiting:
            below = waiting.pop()
            try:
                with os.scandir(self.path / below) as scan:
                    listed = [_local_entry(item, below) for item in scan]
            except FileNotFoundError:
                continue
            here = [entry for entry in listed if entry is not None]
            found += here
            if recursive:
                waiting += [f"{entry.name}/" for entry in here if entry.is_dir]
        return sorted(found, key=lambda entry: entry.name)

    def read_bytes(self, start: int = 0) -> bytes:
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read()

    def source(self) -> str:
        return str(self.path)

    def is_dir(self) -> bool:
        return self.path.is_dir()


def _local_entry(item: os.DirEntry[str], below: str) -> Entry | None:
    try:
        status = item.stat()
    except FileNotFoundError:
        if not item.is_symlink():
            return None  # removed since it was listed
        status = item.stat(follow_symlinks=False)
    except OSError:
        status = item.stat(
            follow_symlinks=False
        )  # a link that goes in a circle: named, to be met when it is read
    is_dir = stat.S_ISDIR(status.st_mode)
    return Entry(below + item.name, is_dir, 0 if is_dir else status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, repr=False)
class RemotePlace(Place):
    """A file or folder behind a URI.

    Attributes:
        uri: what the user wrote, with whatever was joined to its path.
        path: the same within `filesystem`.
        filesystem: a `pyarrow.fs.FileSystem`.
    """

    uri: str
    path: str
    filesystem: Any = field(compare=False)

    def __str__(self) -> str:
        return self.uri

    def __repr__(self) -> str:
        return f"place({_without_secret(self.uri)!r})"

    def __truediv__(self, name: str | os.PathLike[str]) -> "RemotePlace":
        inside = os.fspath(name).replace(os.sep, "/").strip("/")
        head, mark, query = self.uri.partition("?")
        uri = f"{head.rstrip('/')}/{inside}{mark}{query}"
        path = f"{self.path.rstrip('/')}/{inside}" if self.path else inside
        return RemotePlace(uri, path, self.filesystem)

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    @property
    def local(self) -> None:
        return None

    def entries(self, *, recursive: bool = False) -> list[Entry]:
        from pyarrow.fs import FileSelector, FileType  # noqa: PLC0415 - see the module's words

        try:
            # An object store lists a whole tree in the time of one of its folders.
            infos = self.filesystem.get_file_info(
                FileSelector(self.path, allow_not_found=True, recursive=recursive)
            )
        except (OSError, pa.ArrowException) as error:
            raise _unreachable(self.uri, error) from error
        start = len(self.path.strip("/"))
        found = [
            Entry(
                info.path.strip("/")[start:].lstrip("/"),
                info.type == FileType.Directory,
                info.size or 0,
                info.mtime_ns or 0,
            )
            for info in infos
        ]
        return sorted(found, key=lambda entry: entry.name)

    def read_bytes(self, start: int = 0) -> bytes:
        with self._open() as file:
            size = file.size()
            return bytes(file.read_at(size - start, start)) if size > start else b""

    def source(self) -> Any:  # noqa: ANN401 - pyarrow has no types
        return self._open()

    def is_dir(self) -> bool:
        from pyarrow.fs import FileType  # noqa: PLC0415 - see the module's words

        try:
            return bool(self.filesystem.get_file_info(self.path).type == FileType.Directory)
        except (OSError, pa.ArrowException) as error:
            raise _unreachable(self.uri, error) from error

    def _open(self) -> Any:  # noqa: ANN401 - pyarrow has no types
        try:
            return self.filesystem.open_input_file(self.path)
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise _unreachable(self.uri, error) from error


def place(where: str | os.PathLike[str] | Place) -> Place:
    """The place that a path or a URI names; whether anything is there is not looked at.

    Args:
        where: a path, `file://...`, or the URI of an object store (`s3://bucket/path`); its credentials come
            from the environment (for s3 the AWS_* variables, AWS_ENDPOINT_URL included).

    Raises:
        NotARunError: a URI that names no store or no bucket, or whose store this machine cannot talk to.
    """
    if isinstance(where, Place):
        return where
    text = os.fspath(where)
    if not is_uri(text):
        return LocalPlace(Path(text))
    parts = urlsplit(text)
    if parts.scheme.lower() == "file":
        return LocalPlace(_file_path(parts))
    return _remote(text, parts)


def is_uri(text: str) -> bool:
    """Whether a text is a URI and no path of this machine's."""
    return _URI.match(text) is not None


def _file_path(parts: SplitResult) -> Path:
    if parts.netloc not in ("", "localhost"):
        raise NotARunError(
            f"file://{parts.netloc}{parts.path} names a file of another machine; write file:///PATH or just the path"
        )
    path = unquote(parts.path)
    # file:///C:/runs: the slash before a drive's letter belongs to the URI alone.
    return Path(path[1:] if re.match(r"/[A-Za-z]:", path) else path)


def _remote(uri: str, parts: SplitResult) -> RemotePlace:
    scheme = parts.scheme.lower()
    shown = _without_secret(uri)
    if scheme not in _SCHEMES:
        raise NotARunError(
            f"{shown}: there is no store {scheme!r}; give a local path or a URI that begins with one of "
            f"{', '.join(f'{known}://' for known in _SCHEMES)}"
        )
    bucket = parts.netloc.rpartition("@")[2]
    if not bucket and _family(scheme) != "hdfs":
        raise NotARunError(f"{shown} names no bucket; write {scheme}://BUCKET/PATH")
    settings = tuple(
        sorted(
            (key, value) for key, value in os.environ.items() if key.startswith(("AWS_", "GOOGLE_", "AZURE_"))
        )
    )
    query = f"?{parts.query}" if parts.query else ""
    try:
        filesystem, base = _filesystem(f"{parts.scheme}://{parts.netloc}{query}", settings)
    except ImportError as error:
        raise UnreachableError(
            f"{shown} cannot be read: this pyarrow was built without {scheme} ({error}); install the pyarrow of PyPI "
            "or conda-forge"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise _unreachable(uri, error) from error
    path = "/".join(part for part in (base.rstrip("/"), unquote(parts.path).strip("/")) if part)
    if _family(scheme) == "hdfs":
        path = f"/{path.lstrip('/')}"
    clean = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}{query}"
    return RemotePlace(clean, path, filesystem)


@lru_cache(maxsize=16)
def _filesystem(base: str, _settings: tuple[tuple[str, str], ...]) -> tuple[Any, str]:
    """The file system of a bucket; kept, as making one looks up region and credentials each time."""
    from pyarrow.fs import FileSystem  # noqa: PLC0415 - see the module's words

    filesystem, path = FileSystem.from_uri(base)
    return filesystem, path


def _family(scheme: str) -> str:
    return _FAMILY.get(scheme, scheme)


def _without_secret(uri: str) -> str:
    """The URI as it may be shown: a key and its secret may stand before the bucket."""
    scheme, _, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    user, at, bucket = authority.rpartition("@")
    return f"{scheme}://{'...@' if at and ':' in user else user + at}{bucket}{slash}{path}"


def _unreachable(uri: str, error: Exception) -> UnreachableError:
    scheme = _family(uri.partition("://")[0].lower())
    advice = _ADVICE.get(scheme, "check the URI and its credentials")
    # libhdfs tells in sixty lines where it looked.
    reason = " ".join(str(error).partition("\n")[0].split())
    return UnreachableError(
        f"{_without_secret(uri)} cannot be reached ({reason}); check the URI, and {advice}"
    )
