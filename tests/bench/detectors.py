"""What judging a measured step costs: `python tests/bench/detectors.py`. GPT-2's 144 heads and 74 matrices, one core, no torch."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from blocks import block_of

from diagnostics.detect.monitor import Monitor

GOAL_MS = 2.0
STEPS = 300
HEADS = tuple((f"h.{layer:02}.attn", head) for layer in range(12) for head in range(12))
MATRICES = tuple(f"h.{index // 6:02}.{index % 6}.weight" for index in range(74))


def course(step: int) -> dict[str, Any]:
    """A healthy run: everything is measured, nothing grows."""
    draw = np.random.default_rng(step)
    per_head = {
        name: draw.uniform(low, high, len(HEADS))
        for name, low, high in (
            ("entropy", 1, 2), ("entropy_frac", 0.2, 0.9), ("max_logit", 1, 50), ("rank_frac", 0.2, 0.9),
            ("sigma1", 1, 5), ("sec_1", 0.2, 0.6), ("stable_rank", 2, 8), ("effective_rank", 4, 30),
        )
    }  # fmt: skip
    return {
        "loss": 3.0 + float(draw.normal(0, 0.1)), "lr": 1e-3, "grad_norm": 1.0, "adam_rms": 1.0,
        "ratio": draw.uniform(1e-3, 1e-2, len(MATRICES)), "scale": 1.0, **per_head,
    }  # fmt: skip


def main() -> None:
    for every in (10, 1):
        block = block_of(course, STEPS * every, every=every, heads=HEADS, parameters=MATRICES)
        monitor, took_ms = Monitor(), []
        for index in range(len(block)):
            frame = block.part(index, index + 1)
            begun_s = time.perf_counter()
            monitor.feed(frame)
            took_ms.append(1e3 * (time.perf_counter() - begun_s))
        settled = took_ms[len(took_ms) // 3 :]
        median, slow = np.median(settled), np.quantile(settled, 0.99)
        met = "met" if median < GOAL_MS else "MISSED"
        print(
            f"measured every {every} steps: {median:.2f} ms a measured step, 99 % below {slow:.2f} ms; "
            f"goal below {GOAL_MS:g} ms: {met}"
        )


if __name__ == "__main__":
    main()
