"""Which forwards are observed, and that no forward is changed by it.

Shape suffixes: B sequences, H heads, T rows, K head size, D width.
"""

import copy
import statistics
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from live import assert_attention, causal, expected_attention, record, site_named
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as module_hooks
from torch.utils.checkpoint import checkpoint

from diagnostics.attach.sampling import ROWS, spread
from diagnostics.demo.gpt import GPT, GPTShape
from diagnostics.errors import RecorderWarning
from diagnostics.record.recorder import Recorder
from diagnostics.store.read import open_run

SHAPE = GPTShape(width=16, layers=2, heads=2, context=8)
LAYERS = ["blocks.0.attn", "blocks.1.attn"]


def tokens(batch: int = 2) -> Tensor:
    return torch.randint(0, 256, (batch, 8), generator=torch.Generator().manual_seed(batch))


def assert_nothing_is_left(model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
    for table in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_forward_hooks_always_called",
    ):
        assert len(getattr(module_hooks, table)) == 0
    assert torch._C._len_torch_function_stack() == 0
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in vars(module)
    for optimizer in optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("length", [5, 300])
def test_all_rows_are_observed_where_they_are_few_and_a_spread_of_them_where_not(
    length: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    mha = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, length, 8)
    run, _ = record(mha, tmp_path / "run", lambda: mha(x, x, x, attn_mask=causal(length))[0].square().sum())
    assert set(run.attention()["rows"]) == {min(2 * length, ROWS)}
    if 2 * length > ROWS:
        picked = spread(length, ROWS // 2)
        q, k = (
            (x.double() @ w.t().double()).unflatten(-1, (2, 4)).transpose(1, 2)
            for w in mha.in_proj_weight.detach()[:16].reshape(2, 8, 8)
        )
        expected = expected_attention(q[:, :, picked], k, range(2), 0.5, causal(length)[picked])
        assert_attention(run, "", expected)


def test_an_evaluation_is_neither_observed_nor_changed_bit_for_bit(tmp_path: Path) -> None:
    """torch's fused inference path gives other bits than its plain one, so a mere detour would show."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True), 2, enable_nested_tensor=False
    )
    x = torch.randn(3, 5, 16)
    model.eval()
    with torch.no_grad():
        plain = model(x)
    with Recorder(model, run_dir=tmp_path / "run", every=1) as recorder:
        with torch.no_grad():
            assert torch.equal(model(x), plain)
        with torch.inference_mode():
            assert torch.equal(model(x), plain)
        model.train()
        model(x).sum().backward()
        model.eval()
        with torch.no_grad():
            assert torch.equal(model(x), plain)
        recorder.step()
    assert len(open_run(tmp_path / "run").attention()) == 4
    assert_nothing_is_left(model)


def test_a_frozen_part_in_eval_mode_keeps_its_fast_path_within_a_training_forward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    frozen = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False
    )
    frozen.eval().requires_grad_(requires_grad=False)
    trained = nn.MultiheadAttention(16, 2, batch_first=True)
    model = nn.ModuleDict({"frozen": frozen, "trained": trained})

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x_btd: Tensor) -> tuple[Tensor, Tensor]:
            features = self.parts["frozen"](x_btd)
            return features, self.parts["trained"](features, features, features)[0]

    tower, x = Tower(), torch.randn(2, 5, 16)
    plain, _ = tower(x)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        features, out = tower(x)
        seen.append(features)
        total: Tensor = out.sum()
        return total

    _, recorder = record(tower, tmp_path / "run", loss)
    assert torch.equal(seen[0], plain)
    assert [site.name for site in recorder.sites] == ["parts.trained"]
    assert "training forward" in recorder.sites.skipped["parts.frozen.layers.0.self_attn"]


def test_only_the_first_of_several_accumulated_micro_batches_is_observed(tmp_path: Path) -> None:
    model = GPT(SHAPE)
    run, _ = record(model, tmp_path / "run", lambda: model(tokens(2)).sum() + model(tokens(5)).sum())
    assert set(run.attention()["rows"]) == {16}


def test_a_layer_called_twice_in_one_forward_counts_all_its_calls(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x_btd: Tensor) -> Tensor:
            once = self.mha(x_btd, x_btd, x_btd)[0]
            out: Tensor = self.mha(once, once, once)[0]
            return out

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(2, 6, 8)
    once = model.mha(x, x, x)[0].detach()
    run, _ = record(model, tmp_path / "run", lambda: model(x).sum())
    parts = []
    for y in (x, once):
        q, k = (
            (y.double() @ w.t().double()).unflatten(-1, (2, 4)).transpose(1, 2)
            for w in model.mha.in_proj_weight.detach()[:16].reshape(2, 8, 8)
        )
        parts.append(expected_attention(q, k, range(2), 0.5))
    combined = {
        name: [_combine(name)([part[name][head] for part in parts]) for head in range(2)] for name in parts[0]
    }
    assert_attention(run, "mha", combined)


def _combine(name: str) -> Callable[[list[float]], float]:
    if name == "max_logit":
        return max
    if name in ("entropy_min", "entropy_bound"):
        return min
    return sum if name == "rows" else statistics.fmean


def test_towers_called_one_by_one_are_all_observed(tmp_path: Path) -> None:
    model = nn.ModuleDict({"text": GPT(SHAPE), "code": GPT(SHAPE)})
    run, _ = record(
        model, tmp_path / "run", lambda: model["text"](tokens()).sum() + model["code"](tokens()).sum()
    )
    assert sorted(set(run.attention()["layer"])) == [
        f"{t}.{name}" for t in ("code", "text") for name in LAYERS
    ]


def test_a_model_called_through_its_submodules_is_observed_with_spectra(tmp_path: Path) -> None:
    model = GPT(SHAPE)

    def loss() -> Tensor:
        x = model.wte(tokens())
        for block in model.blocks:
            x = block(x)
        return model.head(model.ln_f(x)).sum()  # type: ignore[no-any-return]

    run, recorder = record(model, tmp_path / "run", loss)
    assert sorted(set(run.spectra()["layer"])) == LAYERS
    assert {site.verified for site in recorder.sites} == {"probe"}


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:  # noqa: FBT001 - as torch's own argument
        super().__init__()
        self.gpt, self.use_reentrant = GPT(SHAPE), use_reentrant
        self.dropout = nn.Dropout(0.2)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        x = self.gpt.wte(tokens_bt)
        for block in self.gpt.blocks:
            x = checkpoint(lambda y, b=block: self.dropout(b(y)), x, use_reentrant=self.use_reentrant)
        out: Tensor = self.gpt.head(self.gpt.ln_f(x))
        return out


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_is_observed_once_and_gives_the_same_gradients(
    *,
    use_reentrant: bool,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = Checkpointed(use_reentrant)
    other = copy.deepcopy(model)

    def gradients(of: nn.Module) -> list[Tensor]:
        torch.manual_seed(1)
        of(tokens()).square().mean().backward()
        return [p.grad.clone() for p in of.parameters() if p.grad is not None]

    plain = gradients(other)
    with Recorder(model, run_dir=tmp_path / "run", every=1) as recorder:
        observed = gradients(model)
        recorder.step()
        layouts = {site.name: site.layout for site in recorder.sites}
        verified = {site.verified for site in recorder.sites}
    assert all(torch.equal(a, b) for a, b in zip(plain, observed, strict=True))
    run = open_run(tmp_path / "run")
    assert run.info["faults"] == []
    frame = run.attention()
    assert sorted(set(frame["layer"])) == [f"gpt.{name}" for name in LAYERS]
    assert set(frame["rows"]) == {16}
    assert len(run.spectra()) == 4
    # Nothing can be probed there: the layout is what the names say, and says so.
    assert verified == {"no"}
    assert all("by name" in layout and "checkpoint" in layout for layout in layouts.values())


def test_reentrant_checkpointing_outside_any_module_says_in_words_that_nothing_was_seen(
    tmp_path: Path,
) -> None:
    model = GPT(SHAPE)
    with Recorder(model, run_dir=tmp_path / "run", every=1) as recorder:
        x = model.wte(tokens())
        checkpoint(model.blocks[0], x, use_reentrant=True).sum().backward()
        with pytest.warns(RecorderWarning, match="no attention call was observed"):
            recorder.step()
    assert "checkpoint" in open_run(tmp_path / "run").events()["message"].iloc[0]


def test_a_forward_that_raises_leaves_nothing_behind_and_the_next_step_works(tmp_path: Path) -> None:
    class Raises(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            raise RuntimeError("planned")

    model = GPT(SHAPE)
    sound = model.blocks[1]
    with Recorder(model, run_dir=tmp_path / "run", every=1) as recorder:
        model.blocks[1] = Raises()
        with pytest.raises(RuntimeError, match="planned"):
            model(tokens())
        assert torch._C._len_torch_function_stack() == 0
        model.blocks[1] = sound
        model(tokens()).sum().backward()
        recorder.step()
        model(tokens()).sum().backward()
        recorder.step()
    run = open_run(tmp_path / "run")
    assert run.info["faults"] == []
    assert set(run.attention(start_step=1)["layer"]) == set(LAYERS)
    assert_nothing_is_left(model)


def test_a_fault_at_one_site_marks_that_site_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diagnostics.record.measured_step import MeasuredStep  # noqa: PLC0415 - beside its use

    sound = MeasuredStep.add_call

    def faulty(self: MeasuredStep, site: Any, call: Any) -> None:
        if site.name == LAYERS[0]:
            raise ZeroDivisionError("planted")
        sound(self, site, call)

    monkeypatch.setattr(MeasuredStep, "add_call", faulty)
    model = GPT(SHAPE)
    with Recorder(model, run_dir=tmp_path / "run", every=1) as recorder:
        for _ in range(2):
            if recorder.sites.skipped:
                model(tokens()).sum().backward()
            else:
                with pytest.warns(RecorderWarning, match=r"blocks\.0\.attn is not observed any more"):
                    model(tokens()).sum().backward()
            recorder.step()
        assert [site.name for site in recorder.sites] == LAYERS[1:]
        assert "planted" in recorder.sites.skipped[LAYERS[0]]
    run = open_run(tmp_path / "run")
    assert set(run.attention()["layer"]) == {LAYERS[1]}
    assert set(run.attention()["step"]) == {0, 1}
    assert run.info["faults"][0]["where"] == LAYERS[0]
    assert "planted" in run.info["skipped"][LAYERS[0]]


def test_a_fault_in_the_middle_of_a_forward_takes_every_hook_and_mode_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The handler of a function mode runs with the mode off its stack; torch puts it back afterwards."""
    from diagnostics.attach.observe import Observer  # noqa: PLC0415 - beside its use

    def faulty(*_: object) -> None:
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(Observer, "_remember", faulty)
    model = GPT(SHAPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, tmp_path / "run", every=1) as recorder:

        def two_steps() -> None:
            for _ in range(2):
                model(tokens()).sum().backward()
                recorder.step()

        with pytest.warns(RecorderWarning, match="planted") as caught:
            two_steps()
        assert len(caught) == 1
        assert_nothing_is_left(model, optimizer)
    assert open_run(tmp_path / "run").info["faults"][0]["error"] == "ZeroDivisionError: planted"


def test_layers_keeps_the_matching_sites_only(tmp_path: Path) -> None:
    model = GPT(SHAPE)
    run, recorder = record(
        model, tmp_path / "run", lambda: model(tokens()).sum(), steps=2, layers=r"blocks\.1"
    )
    assert [site.name for site in recorder.sites] == LAYERS[1:]
    assert set(run.attention()["layer"]) == {LAYERS[1]}


def test_a_candidate_that_is_never_called_is_skipped_with_a_reason(tmp_path: Path) -> None:
    model = GPT(SHAPE)
    model.spare = nn.MultiheadAttention(8, 2)
    run, recorder = record(model, tmp_path / "run", lambda: model(tokens()).sum())
    assert [site.name for site in recorder.sites] == LAYERS
    assert "no attention call was seen" in recorder.sites.skipped["spare"]
    assert "spare" in run.info["skipped"]


def test_a_layer_first_called_late_is_found_and_probed_then(tmp_path: Path) -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.active = GPT(SHAPE).blocks[0], GPT(SHAPE).blocks[0], False

        def forward(self, x_btd: Tensor) -> Tensor:
            x_btd = self.a(x_btd)
            return self.b(x_btd) if self.active else x_btd

    model, x, step = Late(), torch.randn(2, 8, 16), iter(range(9))

    def loss() -> Tensor:
        model.active = next(step) >= 2
        return model(x).sum()  # type: ignore[no-any-return]

    run, recorder = record(model, tmp_path / "run", loss, steps=5)
    assert site_named(recorder, "b.attn").verified == "probe"
    assert set(run.attention(start_step=2, end_step=2)["layer"]) == {"a.attn", "b.attn"}


def test_calls_of_another_number_of_heads_in_one_module_are_left_out_in_words(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x_btd: Tensor) -> Tensor:
            total = x_btd
            for heads in (2, 4):
                q, k = (f(x_btd).unflatten(-1, (heads, -1)).transpose(1, 2) for f in (self.a, self.b))
                total = total + functional.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)
            return total

    model, x = Mixed(), torch.randn(2, 5, 8)
    with pytest.warns(RecorderWarning, match="with 2 and with 4 heads"):
        run, _ = record(model, tmp_path / "run", lambda: model(x).sum())
    assert len(run.attention()) == 2


def test_three_dimensional_and_broadcast_calls_are_brought_into_one_form(tmp_path: Path) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x_btd: Tensor, mask: Tensor) -> Tensor:
            return functional.scaled_dot_product_attention(
                self.q(x_btd), self.k(x_btd), x_btd, attn_mask=mask
            )

    torch.manual_seed(0)
    model, x = Single(), torch.randn(3, 5, 8)
    mask = torch.rand(3, 5, 5) < 0.7
    mask[:, :, 0] = True
    run, _ = record(model, tmp_path / "run", lambda: model(x, mask).sum())
    wide = model.double()
    q, k = wide.q(x.double())[:, None], wide.k(x.double())[:, None]
    added = torch.zeros(3, 1, 5, 5).masked_fill(~mask[:, None], -torch.inf)
    assert_attention(run, "", expected_attention(q, k, [0], 8**-0.5, added))


def test_half_precision_is_measured_in_float32_under_autocast(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT(SHAPE)
    with torch.no_grad():
        for block in model.blocks:
            block.get_parameter("attn.c_attn.weight").mul_(30)
    caught: list[Tensor] = []

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            handle = model.get_submodule("blocks.0.attn.c_attn").register_forward_hook(
                lambda _, __, out: caught.append(out.detach())
            )
            out = model(tokens())
            handle.remove()
        return out.float().square().mean()  # type: ignore[no-any-return]

    run, _ = record(model, tmp_path / "run", loss)
    q, k = (y.reshape(2, 8, 2, 8).transpose(1, 2) for y in torch.split(caught[0].double(), 16, dim=-1)[:2])
    assert caught[0].dtype == torch.bfloat16
    assert_attention(run, LAYERS[0], expected_attention(q, k, range(2), 8**-0.5, causal(8)))


def test_the_same_model_running_in_another_thread_meanwhile_is_not_observed(tmp_path: Path) -> None:
    model = GPT(SHAPE)

    class Gate(nn.Module):
        """Half-way through the main thread's forward, all of another thread's."""

        def forward(self, x: Tensor) -> Tensor:
            if threading.current_thread() is threading.main_thread():
                thread = threading.Thread(target=lambda: model(tokens(5)))
                thread.start()
                thread.join()
            return x

    model.blocks.insert(1, Gate())
    run, _ = record(model, tmp_path / "run", lambda: model(tokens()).sum(), steps=2)
    frame = run.attention()
    assert sorted(set(frame["layer"])) == ["blocks.0.attn", "blocks.2.attn"]
    assert set(frame["rows"]) == {16}
