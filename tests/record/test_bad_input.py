"""What cannot work is refused at once in words; what goes wrong later never touches training."""

import copy
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from live_models import Small, batch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from diagnostics.detect.monitor import Monitor
from diagnostics.errors import DiagnosticsError, NoAttentionError, RecorderWarning, RunExistsError
from diagnostics.record.measured_step import MeasuredStep
from diagnostics.record.recorder import Recorder
from diagnostics.record.scalars import Scalars
from diagnostics.record.stream import Stream
from diagnostics.record.update_sizes import UpdateSizes
from diagnostics.record.update_watch import UpdateWatch
from diagnostics.store.read import open_run
from diagnostics.store.write import PartWriter


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu())
        return out


ATTENTIONLESS = {
    "a sequence of layers": lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
    "a convolutional net": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten()),
    "a class of its own": Perceptron,
}


@pytest.mark.parametrize("name", ATTENTIONLESS)
def test_a_model_without_attention_is_refused(name: str, tmp_path: Path) -> None:
    model = ATTENTIONLESS[name]()
    with pytest.raises(
        NoAttentionError, match=f"{type(model).__name__} holds no attention.*Attach to the model that does"
    ):
        Recorder(model, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "every 0": ({"every": 0}, "every is 0, it must be a whole number of at least 1"),
    "every -1": ({"every": -1}, "every is -1, it must be"),
    "every 1.5": ({"every": 1.5}, r"every is 1\.5, it must be"),
    "every True": ({"every": True}, "every is True, it must be"),
    "layers broken": ({"layers": "("}, r"layers is '\(', which is no regular expression"),
    "layers no text": ({"layers": 3}, "layers is 3, which is no regular expression"),
    "layers matching nothing": (
        {"layers": "decoder"},
        "layers is 'decoder', which matches no module path; paths here look",
    ),
    "control": ({"control": "x"}, "control is 'x', it must be one of off, observe, suggest, act"),
    "config": ({"config": [1]}, "config is a list, it must be a mapping"),
    "run_dir": ({"run_dir": 7}, "run_dir is 7; give a path"),
    "run_dir empty": ({"run_dir": ""}, "run_dir is ''; give a path"),
    "run_dir at no store": (
        {"run_dir": "ftp://host/run"},
        "ftp://host/run: there is no store 'ftp'; give a local path or a URI that begins with one of s3://",
    ),
    "optimizer": ({"optimizer": "adam"}, "optimizer is a str, it must be a torch.optim.Optimizer"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_argument_that_cannot_work_is_refused_with_its_value_and_what_is_allowed(
    name: str, tmp_path: Path
) -> None:
    arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        Recorder(Small(), **{"run_dir": tmp_path / "run", **arguments})
    assert not (tmp_path / "run").exists()
    assert not module_hooks._global_forward_hooks


def test_a_model_that_is_no_module_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model is a function, it must be a torch\.nn\.Module"):
        Recorder(batch, run_dir=tmp_path / "run")  # type: ignore[arg-type]


def test_an_optimizer_over_other_parameters_is_refused(tmp_path: Path) -> None:
    other = torch.optim.SGD(Small().parameters(), lr=0.1)
    with pytest.raises(
        DiagnosticsError, match=r"the SGD holds none of the model's parameters; give the optimizer that"
    ):
        Recorder(Small(), other, tmp_path / "run")


def test_a_directory_that_is_being_recorded_is_refused(tmp_path: Path) -> None:
    with Recorder(Small(), run_dir=tmp_path / "run"):
        with pytest.raises(RunExistsError, match=r"records into .* already; close"):
            Recorder(Small(), run_dir=tmp_path / "run")
        assert open_run(tmp_path / "run").info["attempt"] == 1
    assert not module_hooks._global_forward_hooks


def test_a_directory_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DiagnosticsError, match=r"cannot be written .* give a run_dir that you may write to"):
        Recorder(Small(), run_dir=tmp_path / "file" / "run")


def test_a_directory_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(DiagnosticsError, match=r"cannot be written \(\[Errno 13\] Permission denied\)"):
        Recorder(Small(), run_dir=tmp_path / "run")


def test_any_mapping_is_a_config_also_with_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    config: dict[Any, Any] = {
        "tau": float("inf"),
        3: float("nan"),
        "lr": torch.tensor(0.5),
        "path": tmp_path,
        "betas": (0.9, 0.99),
    }
    Recorder(Small(), run_dir=tmp_path / "run", config=config).close()
    kept = open_run(tmp_path / "run").info["config"]
    assert kept == {
        "tau": "inf",
        "3": "nan",
        "lr": "tensor(0.5000)",
        "path": str(tmp_path),
        "betas": [0.9, 0.99],
    }


# --- once training has started -----------------------------------------------------------------------


def train(
    model: nn.Module, recorder: Recorder | None, optimizer: torch.optim.Optimizer, losses: list[Any]
) -> list[Tensor]:
    for step, given in enumerate(losses):
        loss = model(batch(step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if recorder is not None:
            recorder.step(loss=loss if given == "own" else given)
    return [p.detach().clone() for p in model.parameters()]


def spoiled(
    tmp_path: Path,
    losses: list[Any],
    spoil: Callable[[Recorder], None] = lambda _: None,
    pause_s: float = 0.0,
) -> tuple[list[str], Recorder]:
    """Trains with a recorder that something happens to; the warnings, with training checked for its bits."""
    torch.manual_seed(0)
    model = Small()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, twin)]
    torch.manual_seed(1)
    plain = train(model, None, optimizers[0], losses + losses)
    torch.manual_seed(1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Recorder(twin, optimizers[1], tmp_path / "run", every=1) as recorder:
            train(twin, recorder, optimizers[1], losses)
            spoil(recorder)
            time.sleep(pause_s)
            # As long again: whatever broke must not come back at each step.
            for step, given in enumerate(losses):
                loss = twin(batch(len(losses) + step)).square().mean()
                loss.backward()
                optimizers[1].step()
                optimizers[1].zero_grad()
                recorder.step(loss=loss if given == "own" else given)
    other = [p.detach() for p in twin.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    assert torch._C._len_torch_function_stack() == 0
    assert not module_hooks._global_forward_hooks
    assert not optimizers[1]._optimizer_step_pre_hooks
    return [str(w.message) for w in caught if issubclass(w.category, RecorderWarning)], recorder


def test_losses_that_are_not_finite_are_recorded_as_they_are(tmp_path: Path) -> None:
    messages, _ = spoiled(tmp_path, [float("nan"), torch.tensor(float("inf")), -float("inf"), 1.0])
    assert messages == []
    assert list(open_run(tmp_path / "run").steps()["loss"])[1:4] == [float("inf"), -float("inf"), 1.0]


@pytest.mark.parametrize("loss", [torch.ones(2), "low", 1 + 2j, torch.tensor(1j), object(), 10**400], ids=str)
def test_a_loss_of_a_wrong_kind_is_told_once_and_left_out(loss: object, tmp_path: Path) -> None:
    messages, _ = spoiled(tmp_path, [loss, loss, 3.0])
    assert len(messages) == 1
    assert "loss is a" in messages[0]
    assert "give a float or a 0-d tensor" in messages[0]
    losses = open_run(tmp_path / "run").steps()["loss"]
    assert pd.isna(losses[0])
    assert losses[2] == 3.0


def test_no_loss_is_a_null(tmp_path: Path) -> None:
    messages, _ = spoiled(tmp_path, [None, None])
    assert messages == []
    assert open_run(tmp_path / "run").steps()["loss"].isna().all()


def test_weights_that_become_nan_are_recorded_as_nulls_not_as_numbers(tmp_path: Path) -> None:
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        train(model, recorder, optimizer, ["own"])
        with torch.no_grad():
            model.embed.weight.fill_(float("nan"))
        train(model, recorder, optimizer, ["own"])
    run = open_run(tmp_path / "run")
    assert run.info["faults"] == []
    last = run.attention(start_step=1)
    assert len(last) == 4
    assert last["entropy"].isna().all()
    assert (last["rows"] == 0).all()
    assert run.updates(start_step=1)["ratio"].isna().all()
    assert set(run.attention(end_step=0)["rows"]) == {18}


def test_a_full_disk_is_told_once_and_the_run_says_so_where_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def fill(recorder: Recorder) -> None:
        monkeypatch.setattr(PartWriter, "write", full)
        recorder._stream._flushed_s = 0.0

    messages, _ = spoiled(tmp_path, ["own"] * 3, fill, pause_s=0.7)
    assert len(messages) == 1
    assert "No space left on device" in messages[0]
    assert "training goes on untouched" in messages[0]
    faults = open_run(tmp_path / "run").info["faults"]
    assert "No space left" in faults[0]["error"]


def test_a_run_directory_deleted_meanwhile_is_told_once(tmp_path: Path) -> None:
    def delete(recorder: Recorder) -> None:
        shutil.rmtree(recorder.run_dir)
        recorder._stream._flushed_s = recorder._stream._beaten_s = 0.0

    messages, _ = spoiled(tmp_path, ["own"] * 3, delete, pause_s=0.7)
    assert len(messages) == 1
    assert "FileNotFoundError" in messages[0]


PLANTED: dict[str, tuple[object, str]] = {
    "spectra": (MeasuredStep, "_measure_weights"),
    "weights": (MeasuredStep, "add_weights"),
    "rows of a site": (MeasuredStep, "_measure_rows"),
    "updates": (UpdateSizes, "measure"),
    "captures": (UpdateWatch, "capture"),
    "weights before the step": (UpdateWatch, "_remember"),
    "scalars": (Scalars, "kept"),
    "rows": (Stream, "close_measured"),
    "detectors": (Monitor, "feed"),
    "the background thread": (Stream, "absorb"),
}


OF_A_SITE = ("spectra", "weights", "rows of a site")


@pytest.mark.parametrize("place", PLANTED)
def test_a_fault_planted_in_the_measuring_code_is_told_and_training_keeps_its_bits(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = PLANTED[place]

    def faulty(*_: object, **__: object) -> None:
        raise ZeroDivisionError("planted")

    def plant(recorder: Recorder) -> None:
        recorder._on_worker(lambda: None)  # all that was handed over so far is rows by then
        monkeypatch.setattr(owner, name, faulty)

    messages, _ = spoiled(tmp_path, ["own"] * 3, plant, pause_s=0.4)
    # A fault that belongs to a site is told once for each of the two, any other once.
    assert len(messages) == (2 if place in OF_A_SITE else 1)
    assert all("planted" in message for message in messages)
    run = open_run(tmp_path / "run")
    assert run.info["faults"][0]["error"] == "ZeroDivisionError: planted"
    assert set(run.attention()["step"]) >= {0, 1, 2}
    assert run.info["state"] == "finished"
    assert len(run.steps()) == 6 or place not in (*OF_A_SITE, "detectors")


def test_warnings_turned_into_errors_do_not_stop_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Small()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Recorder(model, run_dir=tmp_path / "run", every=5) as recorder:
            recorder.step(loss="low")
    assert "loss is a str" in capsys.readouterr().err
