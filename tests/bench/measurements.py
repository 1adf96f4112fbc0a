"""Measurements against the obvious way of computing them: time, error, memory. Run: python tests/bench/measurements.py.

Everything on one CPU thread, the two sides taking turns so that a busy machine slows both; medians.
Memory is the growth of the process's peak resident set (VmHWM, reset just before) in a fresh child process each.
"""

import multiprocessing
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from diagnostics.measure.fused_entropy import attention_entropy
from diagnostics.measure.sigma1 import largest_singular_value
from diagnostics.measure.spectra import head_spectra

MEBI = 2**20


def medians_s(first: Callable[[], object], second: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Median seconds of each, measured in turns after one unmeasured call each."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, taken in zip((first, second), times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return median(times[0]), median(times[1])


def peak_growth_mib(task: Callable[[int, int], Callable[[], object]], *sizes: int) -> float | None:
    """Peak resident memory one call adds, in MiB, in a child of its own; None where the system does not tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth_here, (task, *sizes))


def _growth_here(task: Callable[[int, int], Callable[[], object]], *sizes: int) -> float:
    torch.set_num_threads(1)
    task(1, 16)()  # libraries loaded and their buffers allocated
    call = task(*sizes)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status_kib("VmRSS")
    call()
    return (_status_kib("VmHWM") - before) * 1024 / MEBI


def _status_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def queries_keys(heads: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, heads, length, 64, generator=generator)
    return 2 * q, k


def naive_entropy(q_bhtk: Tensor, k_bhsk: Tensor) -> Tensor:
    logits_bhts = q_bhtk @ k_bhsk.mT * q_bhtk.shape[-1] ** -0.5
    future = torch.ones(logits_bhts.shape[-2:], dtype=torch.bool).triu(1)
    entropy_bht: Tensor = torch.special.entr(logits_bhts.masked_fill(future, -torch.inf).softmax(-1)).sum(-1)
    return entropy_bht


def naive_task(heads: int, length: int) -> Callable[[], object]:
    return partial(naive_entropy, *queries_keys(heads, length))


def fused_task(heads: int, length: int) -> Callable[[], object]:
    return partial(attention_entropy, *queries_keys(heads, length), is_causal=True)


def entropy_rows(table: Table, notes: list[str]) -> None:
    for heads, length, rounds, goal in ((12, 1024, 7, 10), (4, 4096, 5, 20)):
        naive_s, fused_s = medians_s(naive_task(heads, length), fused_task(heads, length), rounds)
        q, k = queries_keys(heads, length)
        sdpa = partial(scaled_dot_product_attention, q, k, k, is_causal=True)
        sdpa_s, _ = medians_s(sdpa, fused_task(heads, length), rounds)
        notes.append(
            f"entropy, T={length}: one plain scaled_dot_product_attention takes {1e3 * sdpa_s:.1f} ms; V := K cannot be faster"
        )
        expected = naive_entropy(q[:, :1].double(), k[:, :1].double())
        error = (
            (attention_entropy(q[:, :1], k[:, :1], is_causal=True).entropy_bht - expected).abs().max().item()
        )
        memory = [peak_growth_mib(task, heads, length) for task in (naive_task, fused_task)]
        told = ["not measured" if mib is None else f"{mib:.0f}" for mib in memory]
        add(
            table,
            f"entropy, causal, {heads} heads of 64, T={length}",
            naive_s,
            fused_s,
            f"{error:.0e} nats",
            goal,
            " / ".join(told) + " MiB",
        )


def spectra_row(table: Table) -> None:
    generator = torch.Generator().manual_seed(0)
    wq, wk = 0.02 * torch.randn(2, 12, 64, 768, generator=generator)

    def naive(wide_q: Tensor = wq, wide_k: Tensor = wk) -> Tensor:
        sigma_hk: Tensor = torch.linalg.svdvals(wide_q.mT @ wide_k)
        return sigma_hk[:, :64]

    naive_s, ours_s = medians_s(naive, lambda: head_spectra(wq, wk), 3)
    exact = naive(wq.double(), wk.double())
    error = ((head_spectra(wq, wk).singular_values_hk - exact) / exact).abs().max().item()
    add(
        table,
        "spectra, 12 heads of 64, d=768",
        naive_s,
        ours_s,
        f"{error:.0e} of all 64",
        50 if error <= 1e-6 else None,
    )


def power_iteration(a_bmn: Tensor, steps: int) -> Tensor:
    v_bn1 = torch.randn(*a_bmn.shape[::2], 1, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        w_bm1 = a_bmn @ (v_bn1 / v_bn1.norm(dim=1, keepdim=True))
        v_bn1 = a_bmn.mT @ w_bm1
    value_b: Tensor = w_bm1.norm(dim=1)[:, 0]
    return value_b


def sigma1_rows(table: Table, notes: list[str]) -> None:
    for batch, rows, columns, rounds in (
        (16, 128, 128, 9),
        (16, 512, 128, 9),
        (4, 512, 512, 3),
        (1, 3072, 768, 1),
    ):
        generator = torch.Generator().manual_seed(0)
        a, change = torch.randn(2, batch, rows, columns, generator=generator)
        after = a + 1e-3 * change
        vector = largest_singular_value(a).vector_bn
        exact = torch.linalg.svdvals(after.double())[:, 0]

        def error(value_b: Tensor, exact: Tensor = exact) -> float:
            return (value_b.double() / exact - 1).abs().max().item()

        calls = {
            "cold": partial(largest_singular_value, after),
            "warm": partial(largest_singular_value, after, vector),
            "warm, 3 steps": partial(largest_singular_value, after, vector, steps=3, tolerance=None),
        }
        for name, call in calls.items():
            naive_s, ours_s = medians_s(partial(torch.linalg.svdvals, after), call, rounds)
            add(
                table,
                f"sigma1, {batch} of {rows} x {columns}, {name}",
                naive_s,
                ours_s,
                f"{error(call().value_b):.0e}",
                None,
            )
        plain, lanczos = (
            error(power_iteration(after, 8)),
            error(largest_singular_value(after, tolerance=None).value_b),
        )
        notes.append(
            f"{rows} x {columns} Gaussian, 8 steps from a cold start: power iteration {plain:.1e} low, Lanczos {lanczos:.1e}"
        )


def add(
    table: Table, what: str, naive_s: float, ours_s: float, error: str, goal: int | None, memory: str = ""
) -> None:
    ratio = naive_s / ours_s
    verdict = "" if goal is None else f"{'met' if ratio >= goal else 'MISSED'} ({goal}x)"
    table.add_row(
        what, f"{1e3 * naive_s:.2f}", f"{1e3 * ours_s:.2f}", f"{ratio:.1f}x", verdict, error, memory
    )


def main() -> None:
    torch.set_num_threads(1)
    table = Table(title="measurements, one CPU thread, medians of interleaved calls")
    for column in (
        "what",
        "naive ms",
        "ours ms",
        "ratio",
        "goal",
        "largest error",
        "peak memory naive / ours",
    ):
        table.add_column(column)
    notes: list[str] = []
    start = time.perf_counter()
    spectra_row(table)
    entropy_rows(table, notes)
    sigma1_rows(table, notes)
    console = Console(width=150)
    console.print(table)
    for note in notes:
        console.print(note)
    console.print(
        "naive: svdvals of the float32 d x d product; torch.special.entr of the float32 softmax of the T x T logits (the "
        "fastest of four naive forms tried); float32 svdvals. "
        "Errors are against the same in float64, relative for spectra and sigma1. "
        f"The bench took {time.perf_counter() - start:.0f} s."
    )


if __name__ == "__main__":
    main()
