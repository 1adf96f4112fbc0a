"""What the log says of the attention found: a table where it is new, and loudly what is not observed."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from live_models import WIDTH, Small, batch
from torch import Tensor, nn
from torch.nn import functional

from diagnostics.attach.site import Site, Sites
from diagnostics.demo.gpt import CausalSelfAttention, GPTShape
from diagnostics.record.recorder import Recorder
from diagnostics.record.site_report import site_table
from diagnostics.store.read import open_run


def logged(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def train(model: nn.Module, run_dir: Path, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(model, optimizer, run_dir, every=1) as recorder:
        for step in range(steps):
            model(batch(step)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()


def test_the_table_is_logged_at_attach_and_again_where_the_first_step_has_changed_it_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="diagnostics")
    train(Small(), tmp_path / "run", 4)
    attach, first = logged(caplog, logging.INFO)
    assert attach.startswith("Small: 2 attention sites\n")
    assert "layers.0: 2 heads, 2 key heads, size 8, scale of each call, one matrix, rows [q heads;" in attach
    assert "verified" not in attach
    assert "(verified by probe)" in first
    assert "(verified by call)" in first
    assert logged(caplog, logging.WARNING) == []
    assert {record.name for record in caplog.records} == {"diagnostics"}


def test_nothing_is_logged_where_info_is_not_asked_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train(Small(), tmp_path / "run", 3)
    assert capfd.readouterr() == ("", "")


def test_layers_alike_share_a_line_of_the_table() -> None:
    alike = [
        Site(f"h.{index}.attn", 4, 2, 8, scale=0.5, layout="separate", flags=("rope",)) for index in range(12)
    ]
    other = Site("h.12.attn", 4, 4, 8, layout="unknown", reason="not seen")
    table = site_table(Sites([*alike, other], {"h.3.spare": "never called", "": "a fault"}))
    assert table.splitlines() == [
        "  h.0.attn ... h.11.attn (12): 4 heads, 2 key heads, size 8, scale 0.5, separate, rope",
        "  h.12.attn: 4 heads, 4 key heads, size 8, scale of each call, unknown; no spectra: not seen",
        "  h.3.spare: skipped, never called",
        "  (model): skipped, a fault",
    ]
    assert "looked for in the first measured step" in site_table(Sites())


def test_a_site_that_is_found_but_never_called_is_told_loudly_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Small()
    model.spare = nn.MultiheadAttention(8, 2)
    model.more = CausalSelfAttention(GPTShape(width=WIDTH, heads=2))
    train(model, tmp_path / "run", 5)
    (told,) = logged(caplog, logging.WARNING)
    assert "never called in a training forward" in told
    assert told.endswith("of more, spare")
    events = open_run(tmp_path / "run").events()
    assert list(events["kind"]) == ["warning"]
    assert list(events["step"]) == [1]


def test_a_site_that_one_step_skipped_by_chance_is_not_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Sometimes(Small):
        called = 0

        def forward(self, tokens_bt: Tensor) -> Tensor:
            self.called += 1
            x_btd = self.embed(tokens_bt)
            for layer in self.layers if self.called > 1 else self.layers[:1]:
                x_btd = x_btd + layer(x_btd)
            out: Tensor = self.head(x_btd)
            return out

    train(Sometimes(), tmp_path / "run", 4)
    assert logged(caplog, logging.WARNING) == []
    assert set(open_run(tmp_path / "run").attention(start_step=1)["layer"]) == {
        "layers.0",
        "layers.1.self_attn",
    }


def test_a_site_without_spectra_is_told_loudly_once_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Unprojected(Small):
        """Attention of the activations themselves: there is no Wq and no Wk."""

        def forward(self, tokens_bt: Tensor) -> Tensor:
            x_b1td = self.embed(tokens_bt)[:, None]
            out: Tensor = super().forward(tokens_bt)
            return out + functional.scaled_dot_product_attention(x_b1td, x_b1td, x_b1td).mean()

    train(Unprojected(), tmp_path / "run", 3)
    (told,) = logged(caplog, logging.WARNING)
    assert "called, but there are no spectra (no matrix product" in told
    run = open_run(tmp_path / "run")
    assert set(run.attention()["layer"]) == {"", "layers.0", "layers.1.self_attn"}
    assert set(run.spectra()["layer"]) == {"layers.0", "layers.1.self_attn"}


def test_without_logging_set_up_the_table_is_printed_on_stderr(tmp_path: Path) -> None:
    script = (
        "import torch, sys\n"
        "from diagnostics import Recorder\n"
        "model = torch.nn.TransformerEncoderLayer(8, 2, 16)\n"
        "Recorder(model, None, sys.argv[1]).close()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert "TransformerEncoderLayer: 1 attention sites" in done.stderr
    assert "self_attn: 2 heads, 2 key heads, size 4" in done.stderr
