"""The folder of a run behind a URI, for whoever writes there. Readers go through place.py alone."""

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa

from diagnostics.errors import DiagnosticsError
from diagnostics.store.format import TEMPORARY_SUFFIX
from diagnostics.store.place import Place, RemotePlace, place

FAILURES = (OSError, pa.ArrowException)
"""What a store that cannot be reached, or refuses, is met with."""

_PROBE = f".diagnostics-probe{TEMPORARY_SUFFIX}"
# An object appears whole or not at all; everywhere else a file is written under another name first.
_OBJECT_STORES = ("s3", "gcs", "abfs")
_ANSWER_S = 10.0


class Remote:
    """Lists, writes and removes the files of one run behind a URI; names are relative to it, with `/`.

    Every method raises OSError or a pyarrow.ArrowException (`FAILURES`) where the store cannot be reached.

    Args:
        filesystem: a `pyarrow.fs.FileSystem`.
        path: the run's folder in it.
        uri: the same for people, without a secret in it.
    """

    def __init__(self, filesystem: Any, path: str, uri: str) -> None:  # noqa: ANN401 - pyarrow has no types
        self._filesystem = filesystem
        self._whole = filesystem.type_name in _OBJECT_STORES
        self.uri = uri
        self.place: Place = RemotePlace(uri, path, filesystem)
        self._path = path.rstrip("/")

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every file, by name; one listing."""
        return {
            entry.name: entry.size
            for entry in self.place.entries(recursive=True)
            if not entry.is_dir and not entry.name.endswith(TEMPORARY_SUFFIX)
        }

    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is no such file."""
        try:
            return (self.place / name).read_bytes()
        except FileNotFoundError:
            return None

    def put_file(self, source: Path, name: str) -> None:
        """Raises FileNotFoundError where `source` is gone."""
        with source.open("rb") as file:
            self._put(name, file)

    def put(self, content: bytes, name: str) -> None:
        self._put(name, pa.BufferReader(content))

    def remove(self, name: str) -> None:
        """Removes a file, if it is still there."""
        try:
            self._filesystem.delete_file(f"{self._path}/{name}")
        except FileNotFoundError:
            return

    def check_writable(self) -> None:
        """Writes a small file and removes it.

        Raises:
            DiagnosticsError: the store refuses, or cannot be reached.
        """
        try:
            self.put(b"", _PROBE)
        except FAILURES as error:
            raise refused(self.uri, error) from error
        try:
            self.remove(_PROBE)
        except FAILURES:
            return  # may write and may not delete: merged parts are left beside what they replace

    def _put(self, name: str, source: Any) -> None:  # noqa: ANN401 - a file of Python's or of pyarrow's
        target = f"{self._path}/{name}"
        if self._whole:
            self._write(target, source)
            return
        folder, _, last = target.rpartition("/")
        temporary = f"{folder}/.{last}{TEMPORARY_SUFFIX}"
        self._filesystem.create_dir(folder, recursive=True)
        self._write(temporary, source)
        self._filesystem.move(temporary, target)

    def _write(self, path: str, source: Any) -> None:  # noqa: ANN401 - see `_put`
        with self._filesystem.open_output_stream(path, compression=None) as stream:
            while piece := source.read(2**22):
                stream.write(piece)


def open_remote(uri: str | os.PathLike[str]) -> Remote:
    """Where a run's URI leads; nothing is looked at yet.

    Raises:
        NotARunError: no store is known by the URI's scheme, or it names no bucket.
    """
    text = os.fspath(uri)
    found = place(text)
    if not isinstance(found, RemotePlace):
        raise DiagnosticsError(f"{text} is a path of this machine and no URI of a store")
    return Remote(_impatient(found.filesystem), found.path, shown_uri(text))


def _impatient(filesystem: Any) -> Any:  # noqa: ANN401 - pyarrow has no types
    """The same client, but one that gives up after seconds.

    As they are made, clients try for up to five minutes (s3) or fifteen (gcs) when a server accepts connections and
    never answers, and a process cannot exit while a request is under way. Whoever writes tries again later anyway.
    """
    from pyarrow import fs  # noqa: PLC0415 - brings a client for every store; for local runs it is not needed

    # How a client is pickled is also what tells all that it was made with.
    if filesystem.type_name == "s3":
        make, (options,) = filesystem.__reduce__()[:2]
        changed = {
            **options,
            "connect_timeout": _ANSWER_S,
            "request_timeout": _ANSWER_S,
            "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=1),
        }
        if "allow_delayed_open" in options:  # of newer releases: a small file is one request instead of three
            changed["allow_delayed_open"] = True
        return make(changed)
    if filesystem.type_name == "gcs":
        make, (options,) = filesystem.__reduce__()[:2]
        return make({**options, "retry_time_limit": timedelta(seconds=_ANSWER_S)})
    return filesystem


def shown_uri(uri: str) -> str:
    """The URI without what may be a secret, as it is written down and shown: it still names the same run.

    What stands before an `@` goes, for abfs only the password in it, as there the container stands before it.
    """
    scheme, mark, rest = uri.partition("://")
    head, query_mark, query = rest.partition("?")
    authority, slash, path = head.partition("/")
    user, at, host = authority.rpartition("@")
    container = user.partition(":")[0] if scheme.lower() in ("abfs", "abfss") else ""
    kept = "&".join(
        each for each in query.split("&") if re.match(r"(region|scheme|endpoint_override)=", each)
    )
    authority = f"{container}{at}{host}" if container else host
    return f"{scheme}{mark}{authority}{slash}{path.rstrip('/')}{query_mark if kept else ''}{kept}"


def refused(uri: str, error: BaseException) -> DiagnosticsError:
    """What is said to a user whose run cannot be written to a URI."""
    return DiagnosticsError(
        f"{shown_uri(uri)} cannot be written ({reason_of(error)}); check that the bucket exists and that the credentials in the "
        "environment may write to it (for s3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_DEFAULT_REGION, and "
        "AWS_ENDPOINT_URL for a store that is not Amazon's), or give a local run_dir"
    )


def reason_of(error: BaseException) -> str:
    """A store's complaint in one line; libhdfs tells in sixty where it looked."""
    return " ".join(str(error).partition("\n")[0].split())
