"""Models that change while they are recorded: moved, converted, grown, spoiled, copied, not yet made."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live import assert_attention, assert_spectra, causal, expected_attention
from live_models import WIDTH, Small, batch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.demo.gpt import GPT, CausalSelfAttention, GPTShape
from diagnostics.record.recorder import Recorder
from diagnostics.store.read import Run, open_run

Steps = Callable[[Recorder, Callable[[int], None]], None]


def recorded(model: nn.Module, run_dir: Path, steps: Steps, inputs: Callable[[int], Tensor] = batch) -> Run:
    """Trains as `steps` says, each step measured, and checks that nothing went wrong."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, run_dir, every=1) as recorder:

        def train(step: int) -> None:
            loss = model(inputs(step)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step(loss=loss)

        steps(recorder, train)
    run = open_run(run_dir)
    assert run.info["faults"] == []
    return run


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_moved_to_another_dtype_after_attaching_goes_on_being_measured(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Small().eval()
    used: list[Tensor] = []

    def steps(_: Recorder, train: Callable[[int], None]) -> None:
        train(0)
        model.to(dtype)
        used.append(model.get_parameter("layers.0.c_attn.weight").detach().clone())
        train(1)

    run = recorded(model, tmp_path / "run", steps)
    for table in (run.attention(), run.spectra(), run.updates()):
        assert set(table["step"]) == {0, 1}
    assert set(run.attention(start_step=1)["layer"]) == {"layers.0", "layers.1.self_attn"}
    assert (run.updates()["ratio"] > 0).all()
    wq, wk, _ = used[0].split(WIDTH)
    assert_spectra(run, "layers.0", wq.split(8), wk.split(8), step=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_have_the_spectra_of_their_stored_values(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Small().to(dtype)
    used = model.get_parameter("layers.0.c_attn.weight").detach().clone()
    run = recorded(model, tmp_path / "run", lambda _, train: train(0))
    wq, wk, _ = used.split(WIDTH)
    assert_spectra(run, "layers.0", wq.split(8), wk.split(8))
    assert run.attention()["entropy"].notna().all()
    assert {site["verified"] for site in run.info["sites"]} == {"probe", "call"}


def test_a_layer_replaced_by_one_with_other_heads_is_measured_as_what_it_is_now(tmp_path: Path) -> None:
    """Not in the step at hand, which was armed for the old layer: from the next measured one on."""
    torch.manual_seed(0)
    model = Small().eval()
    new = CausalSelfAttention(GPTShape(width=WIDTH, heads=4))
    entered: list[Tensor] = []
    used: list[Tensor] = []

    def steps(recorder: Recorder, train: Callable[[int], None]) -> None:
        train(0)
        model.layers[0] = new
        train(1)
        used.append(new.c_attn.weight.detach().clone())
        new.register_forward_pre_hook(lambda _, args: entered.append(args[0].detach()))
        train(2)
        assert {site.name: site.heads for site in recorder.sites}["layers.0"] == 4

    run = recorded(model, tmp_path / "run", steps)
    before = run.attention(end_step=0)
    assert len(before[before["layer"] == "layers.0"]) == 2
    assert run.attention(start_step=1, end_step=1).empty
    wq, wk, _ = used[0].split(WIDTH)
    q, k = ((entered[0].double() @ w.double().T).unflatten(-1, (4, 4)).transpose(1, 2) for w in (wq, wk))
    assert_attention(run, "layers.0", expected_attention(q, k, range(4), 0.5, causal(q.shape[2])), step=2)
    assert_spectra(run, "layers.0", wq.split(4), wk.split(4), step=2)
    assert len(run.attention(start_step=2)) == 4 + 2


def test_layers_added_while_recording_are_found_and_updated_parameters_follow(tmp_path: Path) -> None:
    """Twice: the second addition meets layers that the recorder had not seen at attach either."""
    torch.manual_seed(0)
    model = Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        for step in range(5):
            if step in (1, 3):
                layer = CausalSelfAttention(GPTShape(width=WIDTH, heads=2))
                model.layers.append(layer)
                optimizer.add_param_group({"params": list(layer.parameters())})
            model(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
        assert {site.verified for site in recorder.sites} == {"probe", "call"}
    run = open_run(tmp_path / "run")
    assert run.info["faults"] == []
    assert recorder.sites.skipped == {}
    first = {"layers.0", "layers.1.self_attn"}
    for step, layers in {0: first, 2: first | {"layers.2"}, 4: first | {"layers.2", "layers.3"}}.items():
        assert set(run.attention(start_step=step, end_step=step)["layer"]) == layers
        assert set(run.spectra(start_step=step, end_step=step)["layer"]) == layers
    assert set(run.attention()["step"]) == {0, 2, 4}
    assert "layers.3.c_attn.weight" in set(run.updates(start_step=4)["parameter"])


def test_a_layer_taken_away_leaves_no_rows_and_no_fault(tmp_path: Path) -> None:
    model = Small()

    def steps(recorder: Recorder, train: Callable[[int], None]) -> None:
        train(0)
        del model.layers[0]
        train(1)
        train(2)
        assert [site.name for site in recorder.sites] == ["layers.0.self_attn"]

    run = recorded(model, tmp_path / "run", steps)
    assert set(run.attention(start_step=1)["layer"]) == {"layers.0.self_attn"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [0, 1])
def test_a_sequence_with_nan_or_infinite_queries_is_left_out_and_the_rest_measured(
    bad: float, first: int, tmp_path: Path
) -> None:
    class Spoiled(nn.Module):
        """Of three sequences the second has queries that are not finite from step `first` on."""

        def __init__(self) -> None:
            super().__init__()
            self.num_heads, self.steps = 2, 0
            self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x_btd: Tensor) -> Tensor:
            q, k = (p(x_btd).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj))
            if self.steps >= first:
                factor = torch.ones(3, 1, 1, 1)
                factor[1] = bad
                q = q * factor
            self.steps += 1
            return functional.scaled_dot_product_attention(q, k, k)[[0, 2]]

    torch.manual_seed(0)
    model = Spoiled()
    x_btd = torch.randn(3, 5, 8)

    def steps(recorder: Recorder, train: Callable[[int], None]) -> None:
        del recorder
        for step in range(first + 1):  # its gradients are NaN, and so are the weights after it
            train(step)

    run = recorded(model, tmp_path / "run", steps, lambda _: x_btd)
    frame = run.attention()
    assert len(frame) == 2 * (first + 1)
    assert set(frame[frame["step"] >= first]["rows"]) == {10}
    assert set(frame[frame["step"] < first]["rows"]) == ({15} if first else set())
    assert frame["entropy"].notna().all()
    assert frame["max_logit"].abs().max() < 100.0


class Lazy(nn.Module):
    """Attention whose projections take their width from the first input."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.q_proj, self.k_proj, self.v_proj = (nn.LazyLinear(WIDTH, bias=False) for _ in range(3))

    def forward(self, x_btd: Tensor) -> Tensor:
        q, k, v = (
            projection(x_btd).unflatten(-1, (2, 8)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return functional.scaled_dot_product_attention(q, k, v)


def test_lazy_projections_are_found_at_their_first_forward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    lazy, used = Lazy(), list[Tensor]()
    model = nn.Sequential(lazy)

    def steps(_: Recorder, train: Callable[[int], None]) -> None:
        train(0)
        used.extend(p.weight.detach().clone() for p in (lazy.q_proj, lazy.k_proj))
        train(1)

    x_btd = torch.randn(3, 5, 12)
    run = recorded(model, tmp_path / "run", steps, lambda _: x_btd)
    assert len(run.attention()) == 4
    assert_spectra(run, "0", used[0].split(8), used[1].split(8), step=1)
    assert set(run.updates()["parameter"]) == {f"0.{name}_proj.weight" for name in "qkv"}
    assert {site["verified"] for site in run.info["sites"]} == {"probe"}


def test_tied_projections_are_each_observed_and_updated_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Small().eval()
    model.layers.append(CausalSelfAttention(GPTShape(width=WIDTH, heads=2)))
    tied = model.get_parameter("layers.0.c_attn.weight")
    model.layers[2].c_attn.weight = tied  # type: ignore[union-attr]
    used = tied.detach().clone()
    run = recorded(model, tmp_path / "run", lambda _, train: train(0))
    wq, wk, _ = used.split(WIDTH)
    for layer in ("layers.0", "layers.2"):
        assert_spectra(run, layer, wq.split(8), wk.split(8))
    names = list(run.updates()["parameter"])
    assert names.count("layers.0.c_attn.weight") == 1
    assert "layers.2.c_attn.weight" not in names


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_made_on_an_armed_step_is_a_plain_model(compiled: bool, tmp_path: Path) -> None:  # noqa: FBT001 - a parameter
    torch.manual_seed(0)
    model = GPT(GPTShape(width=16, layers=1, heads=2, context=8))
    if compiled:
        model.compile(backend="eager")
    tokens = torch.arange(16).view(2, 8)
    expected = model(tokens).detach()
    keys = sorted(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:
        model(tokens).sum().backward()
        file = io.BytesIO()
        torch.save(model, file)
        assert b"diagnostics.record" not in file.getvalue()
        assert b"diagnostics.attach" not in file.getvalue()
        file.seek(0)
        copies: list[Any] = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),  # noqa: S301 - made here
            torch.load(file, weights_only=False),
        ]
        assert sorted(model.state_dict()) == keys
        for other in copies:
            other(tokens).sum().backward()  # trains, unseen
        recorder.step()
        for other in copies:
            assert torch.equal(other(tokens), expected)
            held = [vars(module).values() for module in other.modules()]
            assert "diagnostics.record" not in repr(held)
            assert not any(module._forward_pre_hooks or module._forward_hooks for module in other.modules())
    run = open_run(tmp_path / "run")
    assert run.info["faults"] == []
    assert len(run.attention()) == 2
