"""The stores of the bench, each in a process of its own: what is asked of them, and why one does not answer."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_HERE = Path(__file__).parent
_PEERS_PYTHON = _HERE.parents[1] / ".venv-bench" / "bin" / "python"
_SCRIPTS = {
    "ours": "ours.py",
    "TensorBoard": "tensorboard_peer.py",
    "trackio": "trackio_peer.py",
    "wandb offline": "wandb_peer.py",
    "JSON lines": "jsonl_peer.py",
}
STORES = tuple(_SCRIPTS)
OURS, TENSORBOARD, TRACKIO, WANDB, JSON_LINES = STORES


class RefusedError(Exception):
    """A store's process did not answer; the text says why."""


@dataclass
class Refusals:
    """Why a store has no figure, for the lines below a table."""

    reasons: dict[str, str] = field(default_factory=dict)

    def noted(self, store: str) -> "_Noted":
        """A context: what the store refuses in it is noted, and goes no further."""
        return _Noted(self, store)

    def lines(self) -> list[str]:
        return [f"{store}: not measured: {reason}" for store, reason in self.reasons.items()]


@dataclass(frozen=True)
class _Noted:
    refusals: Refusals
    store: str

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> bool:
        if isinstance(error, RefusedError):
            self.refusals.reasons.setdefault(self.store, str(error))
        return isinstance(error, RefusedError)


def python_of(store: str) -> Path:
    return Path(sys.executable) if store == OURS else _PEERS_PYTHON


def command(store: str, verb: str, folder: Path, *numbers: float) -> list[str]:
    script = _HERE / "peers" / _SCRIPTS[store]
    return [str(python_of(store)), str(script), verb, str(folder), *map(str, numbers)]


def environment() -> dict[str, str]:
    """One thread of arithmetic each, and nothing that would be sent anywhere."""
    single = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    silent = {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "WANDB_ERROR_REPORTING": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    return {**os.environ, **single, **silent, "PYTHONPATH": f"{_HERE}{os.pathsep}{_HERE.parent}"}


def ask(store: str, verb: str, folder: Path, *numbers: float, timeout_s: float = 300.0) -> Any:
    """Carries out one verb and returns its answer.

    Raises:
        RefusedError: there was none.
    """
    try:
        done = subprocess.run(
            command(store, verb, folder, *numbers),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment(),
            check=False,
        )
    except FileNotFoundError:
        raise RefusedError("its environment .venv-bench is not there: `make bench` makes it") from None
    except subprocess.TimeoutExpired:
        raise RefusedError(f"{verb} did not end within {timeout_s:.0f} s") from None
    if verb == "die":
        # It ends by the signal it sends itself: what it says before is of no use.
        return None
    return _answer(done.stdout.splitlines(), done.stderr)


def wall_s(store: str, line: Sequence[str], folder: Path) -> float:
    """Seconds of a whole process, start and end included."""
    started_s = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False, cwd=folder)
    taken_s = time.perf_counter() - started_s
    if done.returncode != 0:
        raise RefusedError(_last_line(done.stderr) or f"{store} ended with {done.returncode}")
    return taken_s


def recording(run_dir: Path) -> str:
    """What `store_recording.py` says of a recording of this project.

    Raises:
        RefusedError: it says nothing.
    """
    line = [sys.executable, str(_HERE / "store_recording.py"), str(run_dir)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode != 0:
        raise RefusedError(_last_line(done.stderr))
    return done.stdout.strip()


class Writer:
    """A process that records one run, a block of steps at a time."""

    def __init__(self, store: str, folder: Path, names: int) -> None:
        self._errors = folder.with_suffix(".err").open("w+")
        try:
            self._process = subprocess.Popen(
                command(store, "write", folder, names),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                env=environment(),
            )
        except FileNotFoundError:
            raise RefusedError("its environment .venv-bench is not there: `make bench` makes it") from None
        self._line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(60)
        self._errors.close()

    def block(self, steps: int, pause_s: float) -> tuple[list[float], list[float]]:
        """Seconds and CPU seconds that each of so many steps took; `pause_s` seconds lie between two."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead: the answer that does not come says why
            self._process.stdin.write(json.dumps([steps, pause_s]) + "\n")
            self._process.stdin.flush()
        seconds, cpu_s = self._line()
        return seconds, cpu_s

    def _line(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait(60)
        self._errors.seek(0)
        return _answer([], self._errors.read())


def _answer(lines: list[str], errors: str) -> Any:
    if not lines:
        raise RefusedError(_last_line(errors) or "it ended without an answer")
    return json.loads(lines[-1])


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
