"""Of a distributed job rank 0 records; another rank writes nothing unless asked, and then under its own names."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from live_models import Small, batch

from diagnostics.control.mailbox import acknowledgement, send
from diagnostics.errors import DiagnosticsError
from diagnostics.record.ranks import Rank, this_rank
from diagnostics.record.recorder import Recorder
from diagnostics.store.format import PartName
from diagnostics.store.read import open_run

JOB = textwrap.dedent(
    """
    import hashlib, json, os, sys
    import torch
    import torch.distributed as dist
    from pathlib import Path
    from torch.nn.parallel import DistributedDataParallel
    from live_models import Small, batch
    from diagnostics import Recorder

    rank, root = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group("gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2)

    def job(folder, recorded):
        torch.manual_seed(0)
        model = DistributedDataParallel(Small())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(rank + 1)
        told, losses = [], []
        for first, last in ((0, 5), (3, 7)):
            recorder = Recorder(model, optimizer, folder / "run", every=2) if recorded else None
            if recorder is not None:
                no_controller = recorder.controller is None
                told.append([len(recorder.sites), recorder.overhead, no_controller, sorted(recorder.state_dict())])
                recorder.load_state_dict({"step": first, "control": {}})
            for step in range(first, last):
                loss = model(batch(2 * step + rank)).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
                if recorder is not None:
                    recorder.step(loss=loss)
            if recorder is not None:
                recorder.close()
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        folder.mkdir(exist_ok=True)
        (folder / f"{rank}.json").write_text(
            json.dumps({"losses": losses, "weights": hashlib.sha256(weights).hexdigest(), "told": told})
        )

    job(root / "plain", False)
    job(root / "rank 0", True)
    os.environ["DIAGNOSTICS_RANKS"] = "all"
    job(root / "all", True)
    dist.destroy_process_group()
    """
)

Jobs = dict[str, tuple[Path, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Two real processes that train a model together, steps 0 to 4 and then 3 to 6; what each of them tells."""
    root = tmp_path_factory.mktemp("jobs")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", JOB, str(rank), str(root)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "GLOO_SOCKET_IFNAME": "lo"},
            text=True, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [process.communicate(timeout=300)[1] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], errors
    return {
        how: (root / how, [json.loads((root / how / f"{rank}.json").read_text()) for rank in range(2)])
        for how in ("plain", "rank 0", "all")
    }


def parts(run_dir: Path) -> list[PartName]:
    names = [PartName.parse(path.name) for path in run_dir.rglob("part-*.parquet")]
    return [name for name in names if name is not None]


@pytest.mark.parametrize("how", ["rank 0", "all"])
def test_training_keeps_its_bits_on_every_rank(how: str, jobs: Jobs) -> None:
    for plain, recorded in zip(jobs["plain"][1], jobs[how][1], strict=True):
        assert (plain["losses"], plain["weights"]) == (recorded["losses"], recorded["weights"])


def test_a_rank_that_is_not_asked_writes_nothing_and_all_of_its_recorder_works(jobs: Jobs) -> None:
    folder, (_, told) = jobs["rank 0"]
    assert {part.rank for part in parts(folder / "run")} == {0}
    assert sorted(path.name for path in (folder / "run" / "tail").iterdir()) == [".writer-0.lock"]
    assert told["told"] == [[0, 0.0, True, []]] * 2


@pytest.mark.parametrize("how", ["rank 0", "all"])
def test_each_row_of_rank_0_is_there_once(how: str, jobs: Jobs) -> None:
    folder, told = jobs[how]
    run = open_run(folder / "run")
    assert run.info["faults"] == []
    assert list(run.steps()["step"]) == list(range(7))
    # Steps 3 and 4 are those of the second attempt.
    losses = told[0]["losses"]
    assert list(run.steps()["loss"]) == pytest.approx([*losses[:3], *losses[5:]], rel=1e-6)
    for table, key in (("attention", "head"), ("spectra", "head"), ("updates", "parameter")):
        frame = run.table(table).to_pandas()
        assert sorted(set(frame["step"])) == [0, 2, 4, 6]
        keys = [name for name in ("step", "layer", key) if name in frame]
        assert not frame.duplicated(keys).any()


def test_a_rank_that_is_asked_writes_its_own_parts_and_says_so_in_a_column(jobs: Jobs) -> None:
    folder, told = jobs["all"]
    found = parts(folder / "run")
    assert {(part.rank, part.attempt) for part in found} == {(0, 1), (0, 2), (1, 1), (1, 2)}
    for path in (folder / "run").rglob("part-*r1*.parquet"):
        if "coarse" not in path.parts:
            assert set(pq.read_table(path)["rank"].to_pylist()) == {1}
    for path in (folder / "run").rglob("part-*.parquet"):
        name = PartName.parse(path.name)
        if name is not None and name.rank == 0 and "coarse" not in path.parts:
            assert "rank" not in pq.read_schema(path).names
    losses = told[1]["losses"]
    steps = open_run(folder / "run", rank=1).steps()
    assert list(steps["loss"]) == pytest.approx([*losses[:3], *losses[5:]], rel=1e-6)
    assert "rank" not in steps.columns
    assert not list((folder / "run" / "tail").glob("*.log"))


def test_run_json_is_rank_0s_alone(jobs: Jobs) -> None:
    info = open_run(jobs["all"][0] / "run").info
    assert [each["first_step"] for each in info["attempts"]] == [0, 3]
    assert [each["state"] for each in info["attempts"]] == ["finished", "finished"]


# --- which rank this is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Rank(0, 1, records=True)),
        ({"WORLD_SIZE": "1", "RANK": "0"}, Rank(0, 1, records=True)),
        # A rank alone says nothing: some launchers set it for single processes too.
        ({"RANK": "3"}, Rank(0, 1, records=True)),
        ({"WORLD_SIZE": "4", "RANK": "0"}, Rank(0, 4, records=True)),
        ({"WORLD_SIZE": "4", "RANK": "2"}, Rank(2, 4, records=False)),
        ({"WORLD_SIZE": "4", "RANK": "2", "DIAGNOSTICS_RANKS": ""}, Rank(2, 4, records=False)),
        ({"WORLD_SIZE": "4", "RANK": "2", "DIAGNOSTICS_RANKS": "all"}, Rank(2, 4, records=True)),
        ({"WORLD_SIZE": "4", "RANK": "2", "DIAGNOSTICS_RANKS": "0, 2"}, Rank(2, 4, records=True)),
        ({"WORLD_SIZE": "4", "RANK": "2", "DIAGNOSTICS_RANKS": "3"}, Rank(2, 4, records=False)),
        # Rank 0 always records.
        ({"WORLD_SIZE": "4", "RANK": "0", "DIAGNOSTICS_RANKS": "3"}, Rank(0, 4, records=True)),
    ],
)
def test_the_rank_is_what_the_launcher_says(
    environment: dict[str, str], expected: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "DIAGNOSTICS_RANKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert this_rank() == expected


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DIAGNOSTICS_RANKS", "1;2", r"DIAGNOSTICS_RANKS is '1;2', it must be 'all' or ranks such as '0,3'"),
        ("DIAGNOSTICS_RANKS", "-1", "DIAGNOSTICS_RANKS is '-1'"),
        ("DIAGNOSTICS_RANKS", "0,", "DIAGNOSTICS_RANKS is '0,'"),
        ("RANK", "x", "RANK is 'x', it must be a whole number"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two', it must be a whole number"),
    ],
)
def test_what_cannot_be_understood_is_refused_on_every_rank(
    variable: str, value: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv(variable, value)
        with pytest.raises(DiagnosticsError, match=message):
            Recorder(Small(), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rank_that_records_must_be_given_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "DIAGNOSTICS_RANKS": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DiagnosticsError, match=r"run_dir is None on rank 1.*must be given one path"):
        Recorder(Small())
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_comes_first_does_not_make_rank_0s_attempt_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("DIAGNOSTICS_RANKS", "all")
    for order in (("1", "0"), ("0", "1"), ("1", "0")):
        recorders = []
        for rank in order:
            monkeypatch.setenv("RANK", rank)
            recorders.append(Recorder(Small(), run_dir=tmp_path, every=1000))
        for recorder in recorders:
            recorder.load_state_dict({"step": 1, "control": {}})
            recorder.step(loss=1.0)
        for recorder in recorders:
            recorder.close()
    names = sorted((part.rank, part.attempt) for part in parts(tmp_path / "steps"))
    assert names == [(rank, attempt) for rank in (0, 1) for attempt in (1, 2, 3)]
    assert open_run(tmp_path).info["attempt"] == 3


# --- commands -----------------------------------------------------------------------------------------


def answer(recorder: Recorder, command: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """What the run says to a command sent between two of its steps."""
    identity = send(recorder.run_dir, command, arguments)
    deadline_s = time.monotonic() + 60.0
    while (said := acknowledgement(recorder.run_dir, identity)) is None and time.monotonic() < deadline_s:
        recorder.step()
        time.sleep(0.01)
    assert said is not None
    return said


def test_of_several_ranks_none_takes_a_command_that_changes_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path, every=1000) as recorder:
        model(batch(0)).sum().backward()
        recorder.step()
        for command, arguments in (("spectral-bound", {"tau": 1e-3}), ("disarm", {"name": "spectral-bound"})):
            said = answer(recorder, command, arguments)
            assert said["status"] == "rejected"
            assert "the job has 2 ranks" in said["reason"]
            assert "drift apart" in said["reason"]
        said = answer(recorder, "status", {})
        assert (said["status"], said["after"]) == ("applied", {"mode": "suggest", "armed": {}})


def test_of_several_ranks_none_acts_by_itself_or_arms_what_a_saved_state_had_armed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "one", every=1000) as recorder:
        assert recorder.controller is not None
        recorder.controller._arm_bound(1e-3)
        state = recorder.state_dict()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with Recorder(model, optimizer, tmp_path / "two", every=1000, control="act") as recorder:
        recorder.load_state_dict(state)
        assert recorder.controller is not None
        recorder.controller.propose("spectral-bound", {"tau": 1e-3}, "entropy collapses")
        model(batch(0)).sum().backward()
        recorder.step()
        assert recorder.controller.armed == {}
    events = open_run(tmp_path / "two").events()
    told = list(zip(events["kind"], events["message"], strict=True))
    assert any(kind == "suggestion" and "on every rank" in message for kind, message in told)
    assert any(kind == "warning" and "saved state is not armed" in message for kind, message in told)
