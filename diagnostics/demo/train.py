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
    on_step: Callable[[int, float], None],
) -> None:
    """Trains one arm and records it.

    Args:
        arm: what to train.
        run_dir: where the run is recorded.
        steps: optimizer steps.
        seed: of the initialisation and of the data order.
        on_step: told each step and its loss.
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
    sender: subprocess.Popen[bytes] | None = None
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
            if arm.rescued and sender is None and _alert_is_on_disk(run_dir, step):
                sender = _send_from_another_process(recorder)
            recorder.step(loss=loss)
            on_step(step, loss.item())
        if sender is not None:
            sender.wait(_COMMAND_ARRIVES_WITHIN_S)


def _alert_is_on_disk(run_dir: Path, step: int) -> bool:
    """Looked at halfway between two measured steps, so that the worker has long written the last one's alerts."""
    return step % EVERY == EVERY // 2 and bool((open_run(run_dir).events(["kind"])["kind"] == "alert").any())


def _send_from_another_process(recorder: Recorder) -> subprocess.Popen[bytes]:
    """What a person would type in another terminal; returns when the command has reached the run."""
    run = str(recorder.run_dir)
    command = [sys.executable, "-m", "diagnostics", "control", run, "spectral-bound", "--tau", str(TAU)]
    sender = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    controller = recorder.controller
    deadline_s = time.monotonic() + _COMMAND_ARRIVES_WITHIN_S
    while controller is not None and not controller.waiting and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return sender
