"""Step records: on disk when `append` returns, read back by the writer once and in order, whatever rolls or rotates."""

import math
import os
import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from diagnostics.store.tail import mapping, step_log
from diagnostics.store.tail.decode import read_steps
from diagnostics.store.tail.frames import MAGIC, NULL, PENDING
from diagnostics.store.tail.name import TailName
from diagnostics.store.tail.step_log import StepLog

# Five records without scalars: 8 bytes of magic, 31 that declare no names, 52 for each record.
SMALL = 300


def append(log: StepLog, step: int, **scalars: float) -> None:
    log.append(step, 1e9 + step, 1e-6, False, step / 2, 0.1, tuple(scalars), list(scalars.values()))


def on_disk(run_dir: Path) -> dict[str, list[int]]:
    """Steps by file, as another process reads them now."""
    return {
        path.name: [row["step"] for row in read_steps(path.read_bytes()).rows]
        for path in sorted((run_dir / "tail").iterdir())
    }


@pytest.fixture(params=["mapped", "written"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of putting a record into a file: memory, and a call where the file system promises no room."""
    if request.param == "written":

        def refused(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr(os, "posix_fallocate", refused, raising=False)
    return str(request.param)


def test_a_record_is_in_the_file_when_append_returns(tmp_path: Path, way: str) -> None:
    log = StepLog(tmp_path)
    assert (log._segment._map is not None) == (way == "mapped")
    for step in range(3):
        append(log, step, a=1.0)
        assert on_disk(tmp_path) == {"steps-000000-0000.log": list(range(step + 1))}


def test_records_are_read_back_once_with_their_scalars(tmp_path: Path, way: str) -> None:
    log = StepLog(tmp_path)
    append(log, 0, a=1.0)
    append(log, 1, b=math.nan, a=-math.inf)
    first = log.read_new()
    append(log, 2, a=PENDING, b=NULL)
    second = log.read_new()
    assert [(row["step"], row["loss"], row["a"]) for row in first] == [(0, 0.0, 1.0), (1, 0.5, -math.inf)]
    assert math.isnan(first[1]["b"])
    assert [(row["step"], row["a"], row["b"]) for row in second] == [(2, None, None)]
    assert log.read_new() == []


def test_a_full_segment_is_followed_by_the_next_and_each_can_be_read_alone(tmp_path: Path, way: str) -> None:
    log = StepLog(tmp_path, segment_bytes=SMALL)
    for step in range(20):
        append(log, step, loss_of_a_head=float(step))
        if step % 5 == 0:
            log.prepare()
    files = on_disk(tmp_path)
    assert list(chain(*files.values())) == list(range(20))
    assert len([steps for steps in files.values() if steps]) > 2
    assert all((tmp_path / "tail" / name).stat().st_size <= SMALL for name in files)
    rows = [
        row for path in sorted((tmp_path / "tail").iterdir()) for row in read_steps(path.read_bytes()).rows
    ]
    assert [row["loss_of_a_head"] for row in rows] == [float(step) for step in range(20)]
    assert [row["step"] for row in log.read_new()] == list(range(20))


def test_the_segment_that_comes_next_is_there_before_it_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StepLog(tmp_path, segment_bytes=SMALL)
    log.prepare()
    made = []

    class Counted(step_log.Segment):
        def __init__(self, folder: Path, name: TailName, size: int) -> None:
            made.append(threading.current_thread())
            super().__init__(folder, name, size)

    monkeypatch.setattr(step_log, "Segment", Counted)
    for step in range(6):
        append(log, step)
    assert on_disk(tmp_path) == {"steps-000000-0000.log": [0, 1, 2, 3, 4], "steps-000000-0001.log": [5]}
    assert made == []


def test_a_record_larger_than_a_segment_gets_one_of_its_own(tmp_path: Path, way: str) -> None:
    log = StepLog(tmp_path, segment_bytes=SMALL)
    log.prepare()
    append(log, 0)
    append(log, 1, **{f"scalar {number}": float(number) for number in range(100)})
    append(log, 2)
    rows = log.read_new()
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [rows[1][f"scalar {number}"] for number in range(100)] == list(map(float, range(100)))
    assert list(chain(*on_disk(tmp_path).values())) == [0, 1, 2]


def test_rotation_leaves_old_records_to_be_read_and_removes_their_files_when_told(
    tmp_path: Path, way: str
) -> None:
    log = StepLog(tmp_path, attempt=2, rank=3, number=7, segment_bytes=SMALL)
    for step in range(8):
        append(log, step)
    log.prepare()
    assert log.rotate(8)
    append(log, 8)
    assert [row["step"] for row in log.read_new(before=8)] == list(range(8))
    assert log.read_new(before=8) == []
    assert on_disk(tmp_path) == {
        "steps-000007a2r3-0000.log": [0, 1, 2, 3, 4],
        "steps-000007a2r3-0001.log": [5, 6, 7],
        "steps-000008a2r3-0000.log": [8],
    }
    for segment in log.retire(8):
        segment.remove()
    assert on_disk(tmp_path) == {"steps-000008a2r3-0000.log": [8]}
    assert [row["step"] for row in log.read_new()] == [8]


def test_closing_leaves_what_is_in_no_part_and_nothing_else(tmp_path: Path) -> None:
    log = StepLog(tmp_path)
    append(log, 0)
    log.read_new()
    log.rotate(1)
    log.prepare()
    log.close()
    assert on_disk(tmp_path) == {"steps-000000-0000.log": [0]}


def test_a_segment_that_cannot_be_made_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StepLog(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="No space left"):
        log.prepare()
    with pytest.raises(OSError, match="No space left"):
        log.rotate(1)
    append(log, 0)
    assert on_disk(tmp_path) == {"steps-000000-0000.log": [0]}


def test_two_threads_lose_nothing_and_read_nothing_twice(tmp_path: Path, way: str) -> None:
    """One appends as fast as it can, one reads, prepares and rotates; every kind of race comes up."""
    steps = 4000
    log = StepLog(tmp_path, segment_bytes=1024)
    failures: list[BaseException] = []

    def train() -> None:
        try:
            for step in range(steps):
                append(log, step, **({"a": 1.0} if step % 7 else {"b": 2.0, "a": 3.0}))
        except BaseException as error:  # noqa: BLE001 - shown by the thread that asserts
            failures.append(error)

    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    trainer = threading.Thread(target=train)
    trainer.start()
    seen: list[int] = []
    number = 0
    try:
        while trainer.is_alive() or len(seen) < steps:
            log.prepare()
            if number % 3 == 0:
                seen += [row["step"] for row in log.read_new()]
            number += 1
            assert log.rotate(number)
            drained = [row["step"] for row in log.read_new(before=number)]
            seen += drained
            for segment in log.retire(number):
                segment.remove()
            assert not failures
    finally:
        trainer.join()
        sys.setswitchinterval(switch_s)
    assert seen == list(range(steps))
    log.close()
    assert on_disk(tmp_path) == {}


def test_a_new_segment_begins_with_the_magic_and_zeros(tmp_path: Path) -> None:
    StepLog(tmp_path)
    data = (tmp_path / "tail" / "steps-000000-0000.log").read_bytes()
    assert data[:8] == MAGIC
    assert not any(data[8:])


def test_a_file_is_mapped_on_a_disk_of_this_machine_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    with path.open("wb+") as file:
        told = subprocess.run(
            ["stat", "-f", "-c", "%T", str(path)], capture_output=True, text=True, check=True
        ).stdout
        # stat speaks of ext2/ext3 where the mount table says ext4.
        assert str(mapping.file_system(file.fileno()))[:3] == told[:3]
        here = mapping.mapped(file.fileno(), 4096)
        assert here is not None
        here.close()
        for kind in ("nfs4", "fuse.sshfs", "lustre", None):
            monkeypatch.setattr(mapping, "file_system", lambda _, kind=kind: kind)
            assert mapping.mapped(file.fileno(), 4096) is None


def test_a_handler_that_records_amid_a_record_neither_waits_for_ever_nor_spoils_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = StepLog(tmp_path)
    log.append(0, 0.0, 0.0, False, 1.0, NULL)
    room_for = log._room_for

    def interrupted(names: tuple[str, ...]) -> Any:
        # As a signal's handler would, within the lock.
        monkeypatch.setattr(log, "_room_for", room_for)
        log.append(1, 0.0, 0.0, False, 2.0, NULL)
        return room_for(names)

    monkeypatch.setattr(log, "_room_for", interrupted)
    log.append(2, 0.0, 0.0, False, 3.0, NULL, ("a",), (4.0,))
    assert [(row["step"], row["loss"], row.get("a")) for row in log.read_new()] == [
        (0, 1.0, None),
        (1, 2.0, None),
        (2, 3.0, 4.0),
    ]
    log.close()
