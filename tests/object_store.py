"""A real S3-compatible server (moto) in a process of its own on this machine, to be stopped and started again."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Self
from urllib.request import Request, urlopen

import pytest

BUCKET = "runs-bucket"


class ObjectStore:
    """One server; what it holds is gone when it is stopped.

    Attributes:
        port: on 127.0.0.1; kept over a restart.
        log: every request that it answered, a line each.
    """

    def __init__(self, log: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.log = log
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What tells clients where the server is, and who they are."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "nobody",
            "AWS_SECRET_ACCESS_KEY": "not-a-secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self, **environment: str) -> None:
        """Starts the server with an empty bucket; returns once it answers."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment, **environment},
            )
        until_s = time.monotonic() + 60.0
        while True:
            assert self._process.poll() is None, self.log.read_text()
            try:
                urlopen(Request(f"{self.url}/{BUCKET}", data=b"", method="PUT")).close()  # noqa: S310 - our own server
            except OSError:
                assert time.monotonic() < until_s, "the server does not answer"
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def requests(self) -> list[str]:
        """Method and address of every request so far."""
        return [line.split('"')[1] for line in self.log.read_text().splitlines() if line.count('"') > 1]


def point_at(store: ObjectStore, spools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this process, and those it starts, talk to the server and to nothing else."""
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DIAGNOSTICS_SPOOL", str(spools))
