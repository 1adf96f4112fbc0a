"""What a recorder writes: tables, columns, values, states."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from live_models import Small, batch
from torch import Tensor, nn

from diagnostics import Recorder, open_run
from diagnostics.errors import DamagedDataWarning
from diagnostics.remedies.spectral_bound import SpectralBound
from diagnostics.store.format import SCHEMAS

TABLES = ("steps", "attention", "spectra", "updates", "events")


def train(
    recorder: Recorder, model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, **scalars: Any
) -> None:
    for step in steps:
        loss = model(batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        recorder.step(loss=loss, **scalars)


def recorded(run_dir: Path, steps: int = 7, **options: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    with Recorder(model, optimizer, run_dir, **{"every": 3, **options}) as recorder:
        train(recorder, model, optimizer, range(steps))
    return model, optimizer


def test_the_five_lines_of_the_contract_record_a_run(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters())
    loader = [batch(step) for step in range(3)]
    with Recorder(model, optimizer, tmp_path / "gpt-lr1e-2", every=10) as recorder:
        for tokens in loader:
            loss = model(tokens).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss=loss)
    run = open_run(tmp_path / "gpt-lr1e-2")
    assert run.info["state"] == "finished"
    assert run.info["steps"] == 3
    assert not run.attention().empty
    assert not run.spectra().empty
    assert not run.updates().empty


def test_every_table_has_the_contracts_columns_and_dtypes(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    f32, i16, i64, f64, text = pa.float32(), pa.int16(), pa.int64(), pa.float64(), pa.string()
    expected = {
        "steps": {
            "step": i64, "time_s": f64, "loss": f64, "lr": f64, "grad_norm": f64, "measured": pa.bool_(), "overhead_s": f64,
        },
        "attention": {
            "step": i64, "layer": text, "head": i16, "entropy": f32, "entropy_min": f32, "entropy_frac": f32,
            "entropy_bound": f32, "max_logit": f32, "rank_frac": f32, "rows": pa.int32(),
        },
        "spectra": {
            "step": i64, "layer": text, "head": i16, "sigma1": f32, "frobenius": f32, "sec_1": f32, "sec_4": f32, "sec_10": f32,
            "stable_rank": f32, "effective_rank": f32, "singular_values": pa.list_(f32),
        },
        "updates": {
            "step": i64, "parameter": text, "sigma1": f32, "update_sigma1": f32, "ratio": f32, "frobenius_ratio": f32, "scale": f32,
        },
        "events": {
            "step": i64, "time_s": f64, "kind": text, "severity": text, "layer": text, "head": i16, "message": text, "data": text,
        },
    }  # fmt: skip
    for table, columns in expected.items():
        for path in (tmp_path / "run" / table).glob("*.parquet"):
            schema = pq.read_schema(path)
            # Behind the contract's columns of `steps` lies what the recorder adds under AdamW.
            added = {"adam_rms": f64} if table == "steps" else {}
            assert list(zip(schema.names, schema.types, strict=True)) == list({**columns, **added}.items())
        assert dict(zip(SCHEMAS[table].names, SCHEMAS[table].types, strict=True)) == columns


def test_every_step_has_a_row_and_only_scheduled_ones_are_measured(tmp_path: Path) -> None:
    recorded(tmp_path / "run", steps=8)
    run = open_run(tmp_path / "run")
    steps = run.steps()
    assert list(steps["step"]) == list(range(8))
    assert list(steps["measured"]) == [step % 3 == 0 for step in range(8)]
    assert list(steps["grad_norm"].notna()) == list(steps["measured"])
    assert (steps["lr"] == 1e-3).all()
    assert steps["loss"].notna().all()
    assert steps["time_s"].is_monotonic_increasing
    assert (steps["overhead_s"] > 0).all()
    for table in (run.attention(), run.spectra(), run.updates()):
        assert set(table["step"]) == {0, 3, 6}


def test_the_overhead_is_a_share_and_counts_no_time_twice(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start_s = time.perf_counter()
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        train(recorder, model, optimizer, range(5))
        total_s = time.perf_counter() - start_s
        assert 0.0 < recorder.overhead < 1.0
    rows = open_run(tmp_path / "run").steps()
    assert 0.0 < rows["overhead_s"].sum() < total_s
    assert 0.0 < open_run(tmp_path / "run").info["overhead"] < 1.0


def test_scalars_of_every_kind_become_float64_columns_and_stay_in_later_parts(tmp_path: Path) -> None:
    model = Small()
    with Recorder(model, run_dir=tmp_path / "run", every=1) as recorder:
        recorder.step(loss=1, tokens=np.int64(5), rate=torch.tensor(0.5, dtype=torch.bfloat16), flag=True)
        recorder.step(loss=np.float32(0.25), tokens=np.array(6), rate=torch.tensor([2]), lr=0.125)
        recorder.step(loss=torch.tensor(3.0, requires_grad=True), grad_norm=7.0)
    steps = open_run(tmp_path / "run").steps()
    assert list(steps["loss"]) == [1.0, 0.25, 3.0]
    assert list(steps["tokens"])[:2] == [5.0, 6.0]
    assert list(steps["rate"])[:2] == [0.5, 2.0]
    assert steps["flag"][0] == 1.0
    assert steps["lr"][1] == 0.125
    assert steps["grad_norm"][2] == 7.0
    assert {str(steps[name].dtype) for name in ("loss", "tokens", "rate", "flag")} == {"float64"}
    assert pd.isna(steps["tokens"][2])


def test_the_gradient_norm_is_that_of_all_gradients_the_optimizer_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        model(batch(0)).square().mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        expected = np.sqrt(
            sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
        )
        optimizer.step()
        recorder.step()
    assert open_run(tmp_path / "run").steps()["grad_norm"][0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tau", [None, 1e-3])
def test_update_ratios_are_those_of_the_whole_step_weight_decay_and_bound_included(
    tau: float | None, tmp_path: Path
) -> None:
    """Exact singular values in float64; the recorder stops at a residual of 1e-3, an error of its square."""
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    bound = None if tau is None else SpectralBound(optimizer, tau)
    before: dict[str, Tensor] = {}
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        for step in range(3):
            model(batch(step)).square().mean().backward()
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    frame = open_run(tmp_path / "run").updates(start_step=2).set_index("parameter")
    matrices = [name for name, p in model.named_parameters() if p.ndim == 2]
    assert sorted(frame.index) == sorted(matrices)
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            continue
        old, new = before[name].double().numpy(), parameter.detach().double().numpy()
        sigma, update = (np.linalg.svd(matrix, compute_uv=False)[0] for matrix in (old, new - old))
        row = frame.loc[name]
        # Rounding of the weights themselves is all that a bounded step of 1e-5 consists of: 1 % there.
        np.testing.assert_allclose(row["sigma1"], sigma, rtol=1e-3)
        np.testing.assert_allclose(row["update_sigma1"], update, rtol=2e-3)
        np.testing.assert_allclose(row["ratio"], update / sigma, rtol=3e-3)
        np.testing.assert_allclose(
            row["frobenius_ratio"], np.linalg.norm(new - old) / np.linalg.norm(old), rtol=1e-4
        )
        if bound is None or name == "embed.weight":
            assert row["scale"] == 1.0
        else:
            assert 0.0 < row["scale"] < 1.0


def test_a_zero_weight_has_an_update_but_no_ratio(tmp_path: Path) -> None:
    model = Small()
    nn.init.zeros_(model.get_parameter("layers.0.c_proj.weight"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        train(recorder, model, optimizer, range(1))
    row = open_run(tmp_path / "run").updates().set_index("parameter").loc["layers.0.c_proj.weight"].to_dict()
    assert row["sigma1"] == 0.0
    assert row["update_sigma1"] > 0.0
    assert pd.isna(row["ratio"])
    assert pd.isna(row["frobenius_ratio"])


def test_spectra_are_of_the_weights_that_the_forward_used(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    used = model.get_parameter("layers.0.c_attn.weight").detach().clone()
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        train(recorder, model, optimizer, range(1))
    frame = open_run(tmp_path / "run").spectra()
    found = frame[(frame["layer"] == "layers.0") & (frame["head"] == 1)]["sigma1"].iloc[0]
    product = used[8:16].double().numpy().T @ used[24:32].double().numpy()
    assert found == pytest.approx(np.linalg.svd(product, compute_uv=False)[0], rel=1e-6)


def test_a_name_that_the_recorder_fills_itself_is_refused_in_words(tmp_path: Path) -> None:
    with Recorder(Small(), run_dir=tmp_path / "run", every=5) as recorder:
        recorder.step(loss=1.0)
        with pytest.warns(UserWarning, match="'measured' is a column that the recorder fills itself"):
            recorder.step(loss=2.0, measured=3.0, epoch=4.0)
    steps = open_run(tmp_path / "run").steps()
    assert list(steps["measured"]) == [True, False]
    assert steps["epoch"][1] == 4.0


def test_disabled_by_the_environment_nothing_is_written_or_hooked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIAGNOSTICS_DISABLED", "1")
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        train(recorder, model, optimizer, range(2))
        assert len(recorder.sites) == 0
        assert recorder.overhead == 0.0
        assert recorder.state_dict() == {}
        recorder.load_state_dict({"step": 3})
        assert recorder.controller is None
        assert recorder.run_dir == str(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_block_left_by_an_exception_is_a_crashed_run_with_the_error(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def training() -> None:
        with Recorder(model, optimizer, tmp_path / "run") as recorder:
            train(recorder, model, optimizer, range(2))
            raise KeyError("batch")

    with pytest.raises(KeyError):
        training()
    info = open_run(tmp_path / "run").info
    assert (info["state"], info["error"], info["steps"]) == ("crashed", "KeyError: 'batch'", 2)


SCRIPT = """
    import sys, time, torch
    from live_models import Small, batch
    from diagnostics import Recorder
    torch.set_num_threads(1)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorder = Recorder(model, optimizer, sys.argv[1], every=2)
    for step in range(int(sys.argv[2])):
        loss = model(batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        recorder.step(loss=loss)
        time.sleep(float(sys.argv[3]))
"""


def start(run_dir: Path, steps: int, pause_s: float, ending: str = "") -> "subprocess.Popen[str]":
    source = textwrap.dedent(SCRIPT) + ending
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, "-c", source, str(run_dir), str(steps), str(pause_s)],
        env=environment, text=True, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_script_that_ends_without_close_leaves_a_finished_run_with_all_rows(tmp_path: Path) -> None:
    process = start(tmp_path / "run", 5, 0.0)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    run = open_run(tmp_path / "run")
    assert run.info["state"] == "finished"
    assert len(run.steps()) == 5


def test_a_script_that_dies_of_an_exception_leaves_a_crashed_run_with_the_error(tmp_path: Path) -> None:
    process = start(tmp_path / "run", 3, 0.0, "raise LookupError('out of data')\n")
    process.communicate(timeout=60)
    run = open_run(tmp_path / "run")
    assert (run.info["state"], run.info["error"]) == ("crashed", "LookupError: out of data")
    assert len(run.steps()) == 3


def test_a_killed_script_leaves_what_was_flushed_and_other_readers_see_it_while_it_runs(
    tmp_path: Path,
) -> None:
    run_dir = tmp_path / "run"
    process = start(run_dir, 10_000, 0.02)
    try:
        deadline_s = time.monotonic() + 60.0
        while len(list(run_dir.glob("attention/*.parquet"))) < 2 and time.monotonic() < deadline_s:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            # What carries a part's name is complete at every moment.
            for path in run_dir.glob("*/*.parquet"):
                pq.read_table(path)
            time.sleep(0.05)
        pattern = str(run_dir / "steps" / "*.parquet")
        relation = duckdb.sql(f"select max(step) from '{pattern}'")  # noqa: S608 - a path of this test
        assert relation is not None
        assert relation.fetchall()[0][0] >= 2
        assert len(pd.read_parquet(run_dir / "attention")) > 0
        assert ds.dataset(run_dir / "spectra").count_rows() > 0
        assert open_run(run_dir).info["state"] == "running"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    run = open_run(run_dir)
    assert run.info["state"] == "crashed"
    steps = run.steps()
    assert list(steps["step"]) == list(range(len(steps)))
    assert len(steps) > 2


def test_a_truncated_part_is_named_and_skipped_and_the_rest_is_read(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    path = max((tmp_path / "run" / "steps").glob("*.parquet"))
    lost = pq.read_table(path).num_rows
    path.write_bytes(path.read_bytes()[:-50])
    run = open_run(tmp_path / "run")
    with pytest.warns(DamagedDataWarning, match=path.name):
        assert len(run.steps()) == 7 - lost
    assert list(run.damaged) == [f"steps/{path.name}"]
    assert len(run.attention()) > 0


def test_a_run_without_a_step_reads_as_empty_tables(tmp_path: Path) -> None:
    Recorder(Small(), run_dir=tmp_path / "run").close()
    run = open_run(tmp_path / "run")
    assert (run.info["state"], run.info["steps"]) == ("finished", 0)
    for table in TABLES:
        frame = getattr(run, table)()
        assert frame.empty
        assert list(frame.columns) == SCHEMAS[table].names


def test_a_resumed_recorder_continues_its_steps_and_its_bound(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    with Recorder(model, optimizer, tmp_path / "a", every=2) as recorder:
        train(recorder, model, optimizer, range(2))
        assert recorder.controller is not None
        recorder.controller._arm_bound(1e-3)
        train(recorder, model, optimizer, range(2, 5))
        torch.save(recorder.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    with Recorder(model, optimizer, tmp_path / "b", every=2) as resumed:
        resumed.load_state_dict(state)
        assert resumed.controller is not None
        armed = resumed.controller.armed["spectral-bound"]
        assert (armed["tau"], armed["steps"]) == (1e-3, 3)
        train(resumed, model, optimizer, range(5, 8))
    run = open_run(tmp_path / "b")
    assert list(run.steps()["step"]) == [5, 6, 7]
    assert set(run.updates()["step"]) == {6}
    assert run.updates().set_index("parameter")["scale"]["layers.0.c_attn.weight"] < 1.0
    assert not optimizer._optimizer_step_post_hooks


def test_a_state_of_another_model_is_taken_without_harm(tmp_path: Path) -> None:
    """Only the step and tau can be taken over; vectors of other shapes would stop the next step."""
    recorder = Recorder(Small(), run_dir=tmp_path / "a", every=1)
    recorder.close()
    small, wide = Small(), nn.TransformerEncoderLayer(24, 2, 8, batch_first=True)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (small, wide)]
    with Recorder(small, optimizers[0], tmp_path / "b", every=1) as recorder:
        assert recorder.controller is not None
        recorder.controller._arm_bound(1e-3)
        train(recorder, small, optimizers[0], range(2))
        state = recorder.state_dict()
    with Recorder(wide, optimizers[1], tmp_path / "c", every=1) as recorder:
        recorder.load_state_dict(state)
        wide(torch.randn(2, 4, 24)).square().mean().backward()
        optimizers[1].step()
        recorder.step()
    run = open_run(tmp_path / "c")
    assert run.info["faults"] == []
    assert list(run.steps()["step"]) == [2]


@pytest.mark.parametrize(("code", "state"), [(None, "finished"), (0, "finished"), (3, "crashed")])
def test_a_block_left_by_sys_exit_ended_as_its_code_says(
    tmp_path: Path, code: int | None, state: str
) -> None:
    def script() -> None:
        model = Small()
        with Recorder(model, None, tmp_path / "run") as recorder:
            model(batch(0))
            recorder.step(loss=1.0)
            sys.exit(code)

    with pytest.raises(SystemExit):
        script()
    assert open_run(tmp_path / "run").info["state"] == state
