"""Recording small real models, and slow float64 answers to compare with, for tests of the live half.

Shape suffixes: B sequences, H query heads, G key heads, T query rows, S keys, K head size, D model width.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diagnostics.attach.site import Site
from diagnostics.record.recorder import Recorder
from diagnostics.store.read import Run, open_run

# Small matrices are slower with more, and the machine is shared with other tests.
torch.set_num_threads(1)

Array = NDArray[np.float64]


def record(
    model: nn.Module,
    run_dir: Path,
    forward: Callable[[], Tensor],
    *,
    steps: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    **options: Any,
) -> tuple[Run, Recorder]:
    """Trains `steps` steps on `forward()` as the loss (SGD with rate 0 unless told otherwise) and closes the run."""
    used = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
    with Recorder(model, used, run_dir, **{"every": 1, **options}) as recorder:
        for _ in range(steps):
            loss = forward()
            loss.backward()
            used.step()
            used.zero_grad()
            recorder.step(loss=loss)
    run = open_run(run_dir)
    assert run.info["faults"] == []
    return run, recorder


def site_named(recorder: Recorder, name: str) -> Site:
    return {site.name: site for site in recorder.sites}[name]


def expected_attention(
    q_bhtk: Tensor, k_bgsk: Tensor, kv_head: Sequence[int], scale: float, added: Tensor | None = None
) -> dict[str, list[float]]:
    """Every attention column by head, row by row in float64 numpy; `added` is broadcast, -inf hides."""
    q, k = q_bhtk.detach().double().numpy(), k_bgsk.detach().double().numpy()
    batch, heads, rows, _ = q.shape
    keys = k.shape[2]
    mask = np.zeros((1, 1, 1, 1)) if added is None else added.detach().double().numpy()
    mask = np.broadcast_to(mask, (batch, heads, rows, keys))
    columns: dict[str, list[float]] = {}
    for head in range(heads):
        found: dict[str, list[float]] = {name: [] for name in ("entropy", "frac", "bound", "largest")}
        maps: list[Array] = []
        for sequence in range(batch):
            for row in range(rows):
                hidden = mask[sequence, head, row]
                logits = scale * (k[sequence, kv_head[head]] @ q[sequence, head, row]) + hidden
                logits = logits[np.isfinite(hidden)]
                if not logits.size:
                    continue
                p = np.exp(logits - logits.max())
                p /= p.sum()
                entropy = -float(sum(x * np.log(x) for x in p if x > 0))
                found["entropy"].append(entropy)
                found["largest"].append(float(logits.max()))
                found["bound"].append(_theorem(logits))
                if logits.size > 1:
                    found["frac"].append(entropy / np.log(logits.size))
                if sequence == 0:
                    line = np.zeros(keys)
                    line[np.isfinite(hidden)] = p
                    maps.append(line)
        sigma = np.linalg.svd(np.array(maps), compute_uv=False)
        share = sigma / sigma.sum()
        rank = np.exp(-sum(x * np.log(x) for x in share if x > 1e-12)) / len(maps)
        for name, value in {
            "entropy": np.mean(found["entropy"]),
            "entropy_min": min(found["entropy"]),
            "entropy_frac": np.mean(found["frac"]),
            "entropy_bound": min(found["bound"]),
            "max_logit": max(found["largest"]),
            "rank_frac": rank,
            "rows": len(found["entropy"]),
        }.items():
            columns.setdefault(name, []).append(float(value))
    return columns


def _theorem(logits: Array) -> float:
    """Theorem 3.1 of arXiv 2303.06296 with the norm of the centred row."""
    keys = logits.size
    if keys == 1:
        return 0.0
    norm = float(np.linalg.norm(logits - logits.mean()))
    beta = np.exp(-norm * np.sqrt(keys / (keys - 1)))
    others = (keys - 1) * beta
    return float(np.log(1 + others) + norm * np.sqrt(keys * (keys - 1)) * beta / (1 + others))


def assert_attention(run: Run, layer: str, expected: dict[str, list[float]], step: int = 0) -> None:
    """The layer's rows of one step are these; float32 arithmetic in the model and in the measurement: 1e-4."""
    frame = run.attention(start_step=step, end_step=step)
    frame = frame[frame["layer"] == layer].sort_values("head")
    assert len(frame) == len(expected["entropy"]), f"{layer}: {len(frame)} rows"
    for name, values in expected.items():
        np.testing.assert_allclose(frame[name], values, rtol=2e-4, atol=2e-4, err_msg=f"{layer} {name}")


def assert_spectra(
    run: Run, layer: str, wq_hkd: Sequence[Tensor], wk_hkd: Sequence[Tensor], step: int = 0
) -> None:
    """Each query head's row is the spectrum of its own Wq^T Wk, formed here in full; float32 storage: 1e-5."""
    frame = run.spectra(start_step=step, end_step=step)
    frame = frame[frame["layer"] == layer].sort_values("head")
    assert len(frame) == len(wq_hkd), f"{layer}: {len(frame)} rows"
    for row, wq, wk in zip(frame.itertuples(), wq_hkd, wk_hkd, strict=True):
        product = wq.detach().double().numpy().T @ wk.detach().double().numpy()
        sigma = np.linalg.svd(product, compute_uv=False)[: wq.shape[0]]
        found: Any = row
        np.testing.assert_allclose(
            found.singular_values, sigma[: len(found.singular_values)], rtol=1e-5, atol=1e-7
        )
        energy = np.cumsum(sigma**2) / np.sum(sigma**2)
        np.testing.assert_allclose(found.sec_1, energy[0], rtol=1e-5)
        np.testing.assert_allclose(found.sec_4, energy[min(3, len(energy) - 1)], rtol=1e-5)
        np.testing.assert_allclose(found.frobenius, np.linalg.norm(sigma), rtol=1e-5)
        np.testing.assert_allclose(found.stable_rank, np.sum(sigma**2) / sigma[0] ** 2, rtol=1e-5)


def causal(rows: int, keys: int | None = None) -> Tensor:
    """Additive causal mask (T, S)."""
    return torch.full((rows, keys or rows), -torch.inf).triu(1)
