"""Training one arm, the way a user would: a plain loop with a recorder in it."""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.nn import functional

from diagnostics.demo.arms import BATCH_SIZE, EVERY, PEAK_LR, SHAPE, TAU, Arm, learning_rate
from diagnostics.demo.gpt import GPT
from diagnostics.demo.text import ByteBatches, standard_library_text
from diagnostics.record.recorder import Recorder
from diagnostics.remedies.spectral_bound import SpectralBound
from diagnostics.store.read import open_run

_COMMAND_ARRIVES_WITHIN_S = 60.0


def train_arm(
    arm: Arm,
    run_dir: Path,
    *,
    steps: int,
    seed: int,
    rescue_step: int | None,
    on_step: Callable[[int, float], None],
) -> int | None:
    """Trains one arm and records it.

    Args:
        arm: what to train.
        run_dir: where the run is recorded.
        steps: optimizer steps.
        seed: of the initialisation and of the data order.
        rescue_step: for the rescued arm: the first step under the bound; None: when the first alert of
            collapse is on disk.
        on_step: told each step and its loss.

    Returns:
        the step from which the rescue was asked for, None where it was not.
    """
    torch.manual_seed(seed)
    model = GPT(SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.1)
    batches = ByteBatches(standard_library_text(), batch_size=BATCH_SIZE, context=SHAPE.context, seed=seed)
    config = {
        "arm": arm.meaning, "lr": PEAK_LR, "warmup_steps": arm.warmup_steps, "batch_size": BATCH_SIZE,
        "context": SHAPE.context, "seed": seed, "tau": TAU if arm.bound_from_start else None,
    }  # fmt: skip
    bound = SpectralBound(optimizer, TAU) if arm.bound_from_start else nullcontext()
    asked: int | None = None
    with bound, Recorder(model, optimizer, run_dir, every=EVERY, config=config) as recorder:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(arm, step)
            inputs_bt, targets_bt = batches.next()
            loss = functional.cross_entropy(model(inputs_bt).flatten(0, 1), targets_bt.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # The command has to lie in the inbox before the step is closed: it is then applied to the next
            # one on every machine, however long another process takes to start.
            if arm.rescued and asked is None and _rescue_is_due(run_dir, step, rescue_step):
                asked = step + 1
                _send_from_another_process(recorder)
            recorder.step(loss=loss)
            on_step(step, float(loss))
    return asked


def _rescue_is_due(run_dir: Path, step: int, rescue_step: int | None) -> bool:
    if rescue_step is not None:
        return step + 1 >= rescue_step
    return step % EVERY == EVERY - 1 and bool((open_run(run_dir).events(["kind"])["kind"] == "alert").any())


def _send_from_another_process(recorder: Recorder) -> None:
    """What a person would type in another terminal."""
    command = [
        sys.executable,
        "-m",
        "diagnostics",
        "control",
        str(recorder.run_dir),
        "spectral-bound",
        "--tau",
        str(TAU),
    ]
    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline_s = time.monotonic() + _COMMAND_ARRIVES_WITHIN_S
    while (
        time.monotonic() < deadline_s and recorder.controller is not None and not recorder.controller.waiting
    ):
        time.sleep(0.02)
