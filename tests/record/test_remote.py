"""Recording to a URI, against a real S3-compatible server on this machine."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from object_store import BUCKET, ObjectStore, point_at
from synthetic import manifest
from torch import nn

from diagnostics import Recorder, open_run
from diagnostics.errors import DiagnosticsError, RecorderWarning, RunExistsError
from diagnostics.store.format import MANIFEST, PartName
from diagnostics.store.place import place
from diagnostics.store.reading.find import find_runs
from diagnostics.store.remote.folder import open_remote
from diagnostics.store.remote.spool import compact_uri, spool_of

torch.set_num_threads(1)

# Records until it is killed; says each step whose `step()` has returned.
ENDLESS = """
import sys, time, torch
from diagnostics import Recorder
torch.set_num_threads(1)
torch.manual_seed(0)
model = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
recorder = Recorder(model, optimizer, sys.argv[1], every=5)
for step in range(int(sys.argv[2])):
    loss = model(torch.randn(2, 5, 8)).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    recorder.step(loss=loss, number=float(step))
    print(step, flush=True)
    time.sleep(0.01)
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    with ObjectStore(tmp_path_factory.mktemp("server") / "log") as store:
        yield store


@pytest.fixture
def store(server: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    point_at(server, tmp_path / "spools", monkeypatch)
    return server


@pytest.fixture
def uri(store: ObjectStore, request: pytest.FixtureRequest) -> str:
    del store
    return f"s3://{BUCKET}/team/{request.node.name[5:40]}"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def train(
    model: nn.Module,
    recorder: Recorder | None,
    steps: int,
    *,
    first: int = 0,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[float]:
    """Steps `first` and on; the data of a step depend on its number alone."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for step in range(first, first + steps):
        data = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(step))
        loss = model(data).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if recorder is not None:
            recorder.step(loss=loss)
    return losses


def until(condition: Callable[[], object], limit_s: float = 60.0) -> None:
    deadline_s = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.05)


def has_steps(uri: str) -> bool:
    names = open_remote(uri).sizes()
    return MANIFEST in names and any(name.startswith("steps/") for name in names)


def steps_of(run: str | Path) -> list[int]:
    return [int(step) for step in open_run(run).steps()["step"]]


def parts_left(spool: Path) -> list[Path]:
    return list(spool.rglob("part-*.parquet"))


def test_a_run_recorded_to_a_uri_is_read_back_there_whole(uri: str, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with Recorder(model, optimizer, uri, every=5, config={"lr": 0.01}) as recorder:
        assert recorder.run_dir == uri
        losses = train(model, recorder, 23, optimizer=optimizer)
    run = open_run(uri)
    assert run.info["state"] == "finished"
    assert run.info["uri"] == uri
    assert run.info["config"] == {"lr": 0.01}
    assert run.steps()["step"].tolist() == list(range(23))
    assert run.steps()["loss"].tolist() == losses
    assert sorted(set(run.attention()["step"])) == [0, 5, 10, 15, 20]
    assert len(run.spectra()) == 5 * 2
    assert sorted(set(run.updates()["step"])) == [0, 5, 10, 15, 20]
    assert run.damaged == {}
    assert find_runs(f"s3://{BUCKET}/team/") == [uri]
    assert parts_left(spool_of(uri)) == []


def test_what_is_recorded_to_a_uri_is_what_is_recorded_to_a_directory(
    uri: str, model: nn.Module, tmp_path: Path
) -> None:
    twin = copy.deepcopy(model)
    with Recorder(model, run_dir=uri, every=5) as recorder:
        train(model, recorder, 20)
    with Recorder(twin, run_dir=tmp_path / "local", every=5) as recorder:
        train(twin, recorder, 20)
    far, near = open_run(uri), open_run(tmp_path / "local")
    assert far.attention().equals(near.attention())
    assert far.spectra().equals(near.spectra())
    assert far.steps(["step", "loss"]).equals(near.steps(["step", "loss"]))


def test_readers_follow_a_live_run_and_run_json_speaks_of_no_more_than_is_there(
    uri: str, model: nn.Module, store: ObjectStore
) -> None:
    before = len(store.requests())
    with Recorder(model, run_dir=uri, every=5) as recorder:
        train(model, recorder, 30)
        until(lambda: has_steps(uri))
        run = open_run(uri)
        assert run.info["state"] == "running"
        seen = len(run.steps())
        assert run.steps()["step"].tolist() == list(range(seen))
        assert seen > 0
    written = [request.split()[1] for request in store.requests()[before:] if request.startswith("PUT")]
    puts = [path.rpartition("/")[2] for path in written if path.endswith((".parquet", MANIFEST))]
    assert puts[-1] == MANIFEST
    assert any(name.startswith("part-") for name in puts)


def test_no_secret_is_written_down(store: ObjectStore, model: nn.Module) -> None:
    del store
    secret = f"s3://nobody:not-a-secret@{BUCKET}/team/secret"
    with Recorder(model, run_dir=secret) as recorder:
        train(model, recorder, 3)
        assert recorder.run_dir == f"s3://{BUCKET}/team/secret"
    run = f"s3://{BUCKET}/team/secret"
    for name in open_remote(run).sizes():
        content = (place(run) / name).read_bytes()
        assert b"not-a-secret" not in content
        assert b"nobody" not in content


def test_a_bucket_that_does_not_exist_is_refused_before_training(
    store: ObjectStore, model: nn.Module
) -> None:
    del store
    with pytest.raises(DiagnosticsError, match=r"s3://no-such-bucket/run cannot be written.*bucket exists"):
        Recorder(model, run_dir="s3://no-such-bucket/run")


def test_a_server_that_is_not_there_is_refused_before_training(
    store: ObjectStore, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    del store
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
        with pytest.raises(DiagnosticsError, match=r"cannot be written.*AWS_ENDPOINT_URL"):
            Recorder(model, run_dir=f"s3://{BUCKET}/run")


@pytest.mark.parametrize("given", ["none", "wrong"])
def test_credentials_that_are_missing_or_wrong_are_refused_before_training(
    given: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = ObjectStore(tmp_path / "log")
    try:
        # The first request, which makes the bucket, is let through; all that follow are checked.
        strict.start(INITIAL_NO_AUTH_ACTION_COUNT="1")
        point_at(strict, tmp_path / "spools", monkeypatch)
        monkeypatch.setenv("HOME", str(tmp_path))
        if given == "none":
            monkeypatch.delenv("AWS_ACCESS_KEY_ID")
            monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        with pytest.raises(DiagnosticsError, match=r"cannot be written.*AWS_ACCESS_KEY_ID"):
            Recorder(model, run_dir=f"s3://{BUCKET}/run")
        assert not (tmp_path / "spools").exists()
    finally:
        strict.stop()


def test_an_unknown_scheme_is_refused(model: nn.Module) -> None:
    with pytest.raises(DiagnosticsError, match="ftp"):
        Recorder(model, run_dir="ftp://host/run")


def test_a_file_uri_is_a_path_of_this_machine(model: nn.Module, tmp_path: Path) -> None:
    with Recorder(model, run_dir=f"file://{tmp_path}/run") as recorder:
        train(model, recorder, 3)
        assert recorder.run_dir == tmp_path / "run"
    assert steps_of(tmp_path / "run") == [0, 1, 2]


def test_training_goes_on_bit_for_bit_while_the_server_is_away_and_everything_arrives_when_it_is_back(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = copy.deepcopy(model)
    expected = train(alone, None, 60)
    run = f"s3://{BUCKET}/team/away"
    server = ObjectStore(tmp_path / "log")
    server.start()
    try:
        point_at(server, tmp_path / "spools", monkeypatch)
        with warnings.catch_warnings(record=True) as met:
            warnings.simplefilter("always")
            with Recorder(model, run_dir=run, every=5) as recorder:
                losses = train(model, recorder, 20)
                until(lambda: has_steps(run))
                server.stop()
                losses += train(model, recorder, 20, first=20)
                until(lambda: any(issubclass(one.category, RecorderWarning) for one in met))
                server.start()
                losses += train(model, recorder, 20, first=40)
        told = [str(one.message) for one in met if issubclass(one.category, RecorderWarning)]
        assert len(told) == 1
        assert str(spool_of(run)) in told[0]
        assert losses == expected
        for mine, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            assert torch.equal(mine, theirs)
        assert steps_of(run) == list(range(60))
        assert open_run(run).steps()["loss"].tolist() == expected
        assert [fault["where"] for fault in open_run(run).info["faults"]] == [f"the upload to {run}"]
        assert parts_left(spool_of(run)) == []
    finally:
        server.stop()


def killed(uri: str) -> int:
    """Records to the URI until some of it is there, kills the process, returns the last step it acknowledged."""
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, uri, "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            until(lambda: process.poll() is not None or has_steps(uri))
            assert process.poll() is None, process.communicate()[1]
            time.sleep(1.0)
        finally:
            process.send_signal(signal.SIGKILL)
        said, _ = process.communicate()
    return int(said.split()[-1])


def test_after_a_kill_all_that_was_uploaded_is_readable_and_compact_brings_the_rest(uri: str) -> None:
    acknowledged = killed(uri)
    spool = spool_of(uri)
    there = steps_of(uri)
    assert there == list(range(len(there)))
    assert 0 < len(there) <= acknowledged + 2
    assert set(range(acknowledged + 1)) <= set(steps_of(spool))
    compact_uri(uri)
    run = open_run(uri)
    after = steps_of(uri)
    assert after == list(range(len(after)))
    assert len(after) >= acknowledged + 1
    assert run.steps()["number"].tolist() == [float(step) for step in after]
    # On a busy machine a measured step may be left out, and then says so.
    told = run.events()
    thinned = set(told[told["message"].str.startswith("what was measured in step")]["step"])
    assert set(range(0, acknowledged - 5, 5)) - thinned <= set(run.attention()["step"])
    assert run.info["state"] == "crashed"
    assert parts_left(spool) == []


def test_after_a_kill_the_next_recorder_brings_the_rest_and_goes_on(uri: str, model: nn.Module) -> None:
    acknowledged = killed(uri)
    with Recorder(model, run_dir=uri, every=5) as recorder:
        recorder.load_state_dict({"step": acknowledged + 1})
        train(model, recorder, 10, first=acknowledged + 1)
    assert steps_of(uri) == list(range(acknowledged + 11))
    run = open_run(uri)
    assert run.info["attempt"] == 2
    assert run.info["state"] == "finished"
    first = open_run(uri, attempt=1).steps()
    assert set(range(acknowledged + 1)) <= set(first["step"])
    assert first["step"].is_unique
    assert parts_left(spool_of(uri)) == []


def test_a_resume_on_another_machine_is_the_next_attempt_and_uses_no_name_twice(
    uri: str, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Recorder(model, run_dir=uri, every=5) as recorder:
        train(model, recorder, 20)
    before = open_remote(uri).sizes()
    monkeypatch.setenv("DIAGNOSTICS_SPOOL", str(tmp_path / "another machine"))
    with Recorder(model, run_dir=uri, every=5) as recorder:
        recorder.load_state_dict({"step": 10})
        train(model, recorder, 20, first=10)
    after = open_remote(uri).sizes()
    old = {name for name in before if name.endswith(".parquet")}
    assert old < set(after)
    numbers = [part.number for name in old if (part := PartName.parse(name.rpartition("/")[2]))]
    added = [PartName.parse(name.rpartition("/")[2]) for name in set(after) - set(before)]
    parts = [part for part in added if part is not None]
    assert {part.attempt for part in parts} == {2}
    assert min(part.number for part in parts) > max(numbers)
    run = open_run(uri)
    assert run.info["attempt"] == 2
    assert run.steps()["step"].tolist() == list(range(30))
    assert open_run(uri, attempt=1).steps()["step"].tolist() == list(range(20))


def test_a_run_that_another_machine_records_is_refused(uri: str, model: nn.Module) -> None:
    theirs = manifest("theirs", state="running", host="elsewhere", pid=4711, heartbeat_s=time.time())
    open_remote(uri).put(json.dumps(theirs).encode(), MANIFEST)
    with pytest.raises(RunExistsError, match="process 4711 on elsewhere"):
        Recorder(model, run_dir=uri)


def test_a_run_of_another_machine_whose_heartbeat_stopped_is_continued(uri: str, model: nn.Module) -> None:
    theirs = manifest("theirs", state="running", host="elsewhere", heartbeat_s=time.time() - 100.0, steps=5)
    open_remote(uri).put(json.dumps(theirs).encode(), MANIFEST)
    with Recorder(model, run_dir=uri) as recorder:
        train(model, recorder, 3)
    assert open_run(uri).info["attempt"] == 2
    assert open_run(uri).info["run_id"] == "theirs"


def test_the_same_uri_twice_in_one_process_is_refused(uri: str, model: nn.Module) -> None:
    with Recorder(model, run_dir=uri), pytest.raises(RunExistsError):
        Recorder(model, run_dir=uri)


def test_a_run_that_was_removed_from_its_store_begins_anew(uri: str, model: nn.Module) -> None:
    with Recorder(model, run_dir=uri) as recorder:
        train(model, recorder, 5)
    first = open_run(uri).info["run_id"]
    remote = open_remote(uri)
    for name in remote.sizes():
        remote.remove(name)
    with Recorder(model, run_dir=uri) as recorder:
        train(model, recorder, 3)
    run = open_run(uri)
    assert run.info["attempt"] == 1
    assert run.info["run_id"] != first
    assert steps_of(uri) == [0, 1, 2]


def test_a_script_that_ends_without_close_uploads_everything_and_says_nothing(uri: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", ENDLESS, uri, "20"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},
    )
    assert ended.returncode == 0
    said = [
        line for line in ended.stderr.splitlines() if not line.startswith(("diagnostics: ", "  self_attn: "))
    ]
    assert said == []
    assert open_run(uri).info["state"] == "finished"
    assert steps_of(uri) == list(range(20))


def test_another_rank_records_to_the_same_uri(
    uri: str, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("DIAGNOSTICS_RANKS", "all")
    twin = copy.deepcopy(model)
    with Recorder(model, run_dir=uri, every=5) as first:
        monkeypatch.setenv("RANK", "1")
        with Recorder(twin, run_dir=uri, every=5) as second:
            train(twin, second, 10)
        train(model, first, 10)
    assert steps_of(uri) == list(range(10))
    assert open_run(uri, rank=1).steps()["step"].tolist() == list(range(10))
    assert spool_of(uri, 1) != spool_of(uri)


def test_compact_on_a_live_run_leaves_the_uploading_to_its_recorder(uri: str, model: nn.Module) -> None:
    with Recorder(model, run_dir=uri, every=5) as recorder:
        train(model, recorder, 10)
        until(lambda: has_steps(uri))
        train(model, recorder, 10, first=10)
        compact_uri(uri)
        train(model, recorder, 10, first=20)
        assert steps_of(spool_of(uri)) == list(range(30))
    assert steps_of(uri) == list(range(30))
    assert open_run(uri).info["state"] == "finished"
