"""One writer to a run directory: by the kernel's lock, within a process too, and let go by every kind of death."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from diagnostics.errors import RunExistsError
from diagnostics.store.lock import SETTLES, hold, holding, lock_path

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

HOLDER = """
import sys, time
from pathlib import Path
from diagnostics.store.lock import hold
lock = hold(Path(sys.argv[1]), purpose=sys.argv[2])
print("held", flush=True)
time.sleep(float(sys.argv[3]))
lock.release()
print("released", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(
    run_dir: Path, purpose: str = "records", seconds: float = 60.0
) -> Iterator["subprocess.Popen[str]"]:
    """Another process that holds the lock when the block begins."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run_dir), purpose, str(seconds)], text=True, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=30)


def in_a_fork(job: Callable[[], object]) -> bool:
    """Whether a job goes through in a forked child."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            job()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1] == 0


def test_a_second_process_is_refused_with_the_pid_and_host_of_the_first(tmp_path: Path) -> None:
    with (
        holder(tmp_path) as other,
        pytest.raises(
            RunExistsError,
            match=rf"recorded by process {other.pid} on {os.uname().nodename}.*another run_dir",
        ),
    ):
        hold(tmp_path)


def test_a_kill_lets_go_at_once(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
        other.wait(timeout=30)
        with holding(tmp_path) as lock:
            assert lock.last["pid"] == other.pid


def test_another_rank_has_a_lock_of_its_own(tmp_path: Path) -> None:
    with holder(tmp_path), holding(tmp_path, rank=1):
        assert lock_path(tmp_path, 1) != lock_path(tmp_path, 0)


def test_one_that_only_settles_is_waited_for(tmp_path: Path) -> None:
    with holder(tmp_path, SETTLES, 0.5) as other, holding(tmp_path):
        assert other.stdout is not None
        assert other.stdout.readline() == "released\n"


def test_this_process_is_refused_too_by_any_name_of_the_directory(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with holding(run_dir, purpose="records"):
        (tmp_path / "link").symlink_to(run_dir)
        for name in (run_dir, tmp_path / "link", tmp_path / "x" / ".." / "run"):
            (tmp_path / "x").mkdir(exist_ok=True)
            with pytest.raises(
                RunExistsError, match=rf"this process \({os.getpid()}\) records into .* close\(\)"
            ):
                hold(name)
        # And being refused has not dropped the lock that is held.
        assert not in_a_fork(lambda: hold(run_dir))
    hold(run_dir).release()


def test_a_directory_removed_and_made_again_is_another_one(tmp_path: Path) -> None:
    old = hold(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with holding(tmp_path / "run", purpose="records"):
        old.release()
        assert not in_a_fork(lambda: hold(tmp_path / "run"))


def test_of_many_threads_one_gets_it(tmp_path: Path) -> None:
    got, refused = [], []

    def take() -> None:
        try:
            got.append(hold(tmp_path))
        except RunExistsError as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(refused)) == (1, 7)
    got[0].release()


def test_a_forked_child_neither_holds_nor_drops_the_lock(tmp_path: Path) -> None:
    lock = hold(tmp_path)
    assert not in_a_fork(lambda: hold(tmp_path))
    assert in_a_fork(lock.release)
    assert not in_a_fork(lambda: hold(tmp_path))
    lock.release()


def test_a_worker_that_outlives_its_killed_training_does_not_hold_it(tmp_path: Path) -> None:
    read, write = os.pipe()

    def train() -> None:
        hold(tmp_path)
        if os.fork() == 0:
            os.close(write)
            os.read(read, 1)  # until the test ends
            os._exit(0)

    assert in_a_fork(train)
    with holding(tmp_path):
        os.close(write)
    os.close(read)


def test_releasing_twice_does_not_take_it_from_the_next_holder(tmp_path: Path) -> None:
    first = hold(tmp_path)
    first.release()
    with holding(tmp_path, purpose="records"):
        first.release()
        assert not in_a_fork(lambda: hold(tmp_path))


def test_the_attempt_noted_is_kept_for_all_later_holders(tmp_path: Path) -> None:
    with holding(tmp_path) as lock:
        lock.note(attempt=3)
    with holding(tmp_path) as lock:
        assert lock.last["attempt"] == 3
    with holding(tmp_path) as lock:
        assert lock.last["attempt"] == 3


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\0" * 512, b"\xff"])
def test_a_lock_file_of_any_content_can_be_held(content: bytes, tmp_path: Path) -> None:
    lock_path(tmp_path).parent.mkdir()
    lock_path(tmp_path).write_bytes(content)
    with holding(tmp_path) as lock:
        assert lock.last == {}


# --- a file system without locks -----------------------------------------------------------------------


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refused)


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_process_that_noted_itself_counts_while_it_lives(tmp_path: Path) -> None:
    with holder(tmp_path) as other:
        with pytest.raises(RunExistsError, match=f"process {other.pid} on"):
            hold(tmp_path)
        other.kill()
        other.wait(timeout=30)
        with holding(tmp_path) as lock:
            assert not lock.of_kernel


@pytest.mark.usefixtures("no_locks")
def test_without_locks_one_that_let_go_does_not_count(tmp_path: Path) -> None:
    with holder(tmp_path, seconds=0.0) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "released\n"
        hold(tmp_path).release()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_second_one_in_this_process_is_refused(tmp_path: Path) -> None:
    with holding(tmp_path, purpose="records"), pytest.raises(RunExistsError, match="this process"):
        hold(tmp_path)


def test_the_file_says_who_holds_it(tmp_path: Path) -> None:
    with holding(tmp_path, purpose="records"):
        # Only a reading child may open it: in this process closing it would let go.
        assert in_a_fork(lambda: check_note(lock_path(tmp_path), os.getppid()))


def check_note(path: Path, pid: int) -> None:
    told = json.loads(path.read_text())
    assert (told["pid"], told["purpose"]) == (pid, "records")
