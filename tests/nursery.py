"""A process that forks recording processes and ends them the hard way; `dying.py` drives it.

It imports torch once and starts no thread of its own, so that a recording process costs a fork. Orders come as
one JSON object a line on stdin; the answer to each is one line on stdout, sent once the process is dead.
"""

import contextlib
import json
import mmap
import os
import pickle
import re
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from dying import ACK, ACKS_AT, late, noisy
from torch import Tensor, nn

from diagnostics.demo.gpt import CausalSelfAttention, GPTShape
from diagnostics.record.recorder import Recorder

WIDTH, VOCABULARY = 8, 11

# What the store calls of os without an audit event; each is one more instant to die at.
_CALLS = ("write", "pwrite", "fsync", "posix_fallocate")
_EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link", "os.symlink")


class Tiny(nn.Module):
    """Tokens (B, T) to logits (B, T, V): two attention sites of two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.attentions = nn.ModuleList(CausalSelfAttention(GPTShape(width=WIDTH, heads=2)) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        x_btd = self.embed(tokens_bt)
        for attention in self.attentions:
            x_btd = x_btd + attention(x_btd)
        logits_btv: Tensor = self.head(x_btd)
        return logits_btv


class Ops:
    """Counts what the process does to its run directory, and dies at a chosen moment.

    A moment is named by what is done to which kind of file, digits left out, and how often it was before.
    """

    def __init__(self, root: str, die_at: tuple[str, int] | None) -> None:
        self._root = root
        self._die_at = die_at
        self._seen: dict[str, int] = {}
        self._lock = threading.Lock()

    def install(self) -> None:
        for name in _CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        sys.addaudithook(self._on_event)

    @property
    def seen(self) -> dict[str, int]:
        return dict(self._seen)

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            for place in arguments[:1]:
                if isinstance(place, int) and place >= 0:
                    self._note(event, _path_of(place))
                elif isinstance(place, str | os.PathLike | bytes):
                    self._note(event, os.fsdecode(place))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(descriptor: int, *arguments: Any) -> Any:
            path = _path_of(descriptor)
            # Half of a frame is what a kill in the middle of a write leaves.
            if name in {"write", "pwrite"} and self._due(f"half {name}", path):
                data = bytes(arguments[0])
                call(descriptor, data[: len(data) // 2], *arguments[1:])
                _die()
            self._note(name, path)
            return call(descriptor, *arguments)

        return counted

    def _note(self, what: str, path: str) -> None:
        if self._due(what, path):
            _die()

    def _due(self, what: str, path: str) -> bool:
        # To open or to sync a folder changes nothing in it.
        if not path.startswith(self._root) or (Path(path).is_dir() and what in {"open", "fsync"}):
            return False
        key = f"{what} {re.sub('[0-9]+', '#', path[len(self._root) :])}"
        with self._lock:
            self._seen[key] = count = self._seen.get(key, 0) + 1
        return self._die_at == (key, count)


def _path_of(descriptor: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: PTH115 - a string prefix is compared
    except OSError:
        return ""


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a killed process went on")


class Acknowledgements:
    """What `recorder.step` has promised by returning, in memory that outlives the process."""

    def __init__(self, path: str) -> None:
        with Path(path).open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)

    @property
    def count(self) -> int:
        return int(struct.unpack_from("<q", self._map)[0])

    def add(self, step: int, loss: float | None) -> None:
        count = self.count
        given = (step, 0.0 if loss is None else loss, loss is None)
        struct.pack_into(ACK, self._map, ACKS_AT + count * struct.calcsize(ACK), *given)
        # Last: a record counts once it is whole.
        struct.pack_into("<q", self._map, 0, count + 1)


def train(order: dict[str, Any], acks: Acknowledgements) -> None:
    """Records as the order says; ends by itself only where the order says so."""
    torch.manual_seed(0)
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    step, saved = 0, None
    if order["state"] and Path(order["state"]).exists() and order["resume"]:
        saved = pickle.loads(Path(order["state"]).read_bytes())  # noqa: S301 - written below
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step = saved["step"]
    recorder = Recorder(model, optimizer, order["run_dir"], every=order["every"])
    # A script that never closes its recorder leaves that to the interpreter's end.
    with contextlib.nullcontext() if order["ending"] == "no close" else recorder:
        if saved is not None:
            recorder.load_state_dict(saved["recorder"])
        while step < order["steps"]:
            _one_step(model, optimizer, recorder, step, acks)
            step += 1
            if order["state"] and step % order["save_every"] == 0:
                _save(order["state"], model, optimizer, recorder, step)
        _end(order["ending"])


def _one_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    recorder: Recorder,
    step: int,
    acks: Acknowledgements,
) -> None:
    tokens_bt = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(step))
    value = model(tokens_bt).square().mean()
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = None if step % 19 == 18 else value.item()
    scalars = {"noisy": noisy(step)}
    if (appearing := late(step)) is not None:
        scalars["late"] = appearing
    recorder.step(loss=loss, **scalars)
    acks.add(step, loss)


def _save(
    path: str, model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder, step: int
) -> None:
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "recorder": recorder.state_dict(),
    }
    temporary = Path(f"{path}.new")
    temporary.write_bytes(pickle.dumps(state))
    temporary.replace(path)


def _end(ending: str) -> None:
    if ending == "os._exit":
        os._exit(3)
    if ending == "exception":
        raise RuntimeError("the loss is not what it was")
    if ending == "exit in a thread":
        thread = threading.Thread(target=sys.exit, args=(5,))
        thread.start()
        thread.join()
    assert ending in {"close", "no close", "exit in a thread"}, ending


def hurry(cadence: dict[str, Any]) -> None:
    """Makes flushes and merges happen within milliseconds."""
    from hurrying import hurry as set_cadence  # noqa: PLC0415 - loads what it changes

    set_cadence(**cadence)


def obey(order: dict[str, Any]) -> dict[str, Any]:
    """Forks the recording process, ends it as ordered, and says how it ended."""
    acks = Acknowledgements(order["acks"])
    threads = list(Path("/proc/self/task").iterdir())
    begun_s = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(order, acks)
    kill = order["kill"]
    ended = None if kill is None else _wait(pid, kill, acks, begun_s)
    status = os.waitpid(pid, 0)[1] if ended is None else ended
    return {"status": status, "threads": len(threads), "wall_s": time.monotonic() - begun_s}


def _wait(pid: int, kill: dict[str, Any], acks: Acknowledgements, begun_s: float) -> int | None:
    """Sends the signal once so many steps are acknowledged and so many seconds have passed since."""
    while acks.count < kill["after_acks"]:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() - begun_s > 60:
            os.kill(pid, signal.SIGABRT)
            break
        time.sleep(0.0003)
    time.sleep(kill["delay_s"])
    os.kill(pid, getattr(signal, kill["signal"]))
    return None


def _child(order: dict[str, Any], acks: Acknowledgements) -> NoReturn:
    ops = None
    errors = Path(order["acks"] + ".err")
    # Its own words go to a file: stdout carries the answers.
    descriptor = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.dup2(descriptor, 1)
    if order["cadence"] is not None:
        hurry(order["cadence"])
    if order["ops"]:
        die_at = order["die_at"]
        ops = Ops(order["run_dir"], tuple(die_at) if die_at else None)
        ops.install()
    try:
        train(order, acks)
    except SystemExit:
        raise
    except BaseException:  # noqa: BLE001 - the interpreter would end in the nursery's own loop
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    if ops is not None:
        Path(order["acks"] + ".ops").write_text(json.dumps(ops.seen))
    sys.exit(0)


def main() -> None:
    torch.set_num_threads(1)
    # The first use of torch's optimizers loads hundreds of modules.
    model = Tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    optimizer.step()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        answer = obey(json.loads(line))
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
