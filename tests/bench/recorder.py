"""What the recorder and the spectral bound cost per training step of a small GPT: `python tests/bench/recorder.py`.

The arms take turns within one process and one run, a block of ten steps each, in an order that rotates: whatever
the machine does meanwhile, it does to all of them. Each has its own copy of the model and sees the same data.
Times are of single steps, medians over all; the arm that measures every tenth step is told by medians over the
means of blocks, and compared with the same of the `off` arm. The second `off` arm tells what a difference means here. Measurements are made on a thread beside
training: where no core is idle, what they take is the difference in CPU time, which counts all threads.
"""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from diagnostics import Recorder, SpectralBound
from diagnostics.demo.gpt import GPT, GPTShape

BLOCK = 10
GOALS = {"every 10 steps": 1.03, "every step": 1.15}


@dataclass
class Arm:
    """One way of training, and the seconds its steps took."""

    name: str
    attach: Callable[[GPT, torch.optim.Optimizer, Path], AbstractContextManager[object]]
    blocks: list[list[float]] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def step_s(self, *, by_block: bool) -> float:
        if by_block:
            return statistics.median(statistics.fmean(block) for block in self.blocks)
        return statistics.median(seconds for block in self.blocks for seconds in block)


def recorder(every: int) -> Callable[[GPT, torch.optim.Optimizer, Path], AbstractContextManager[object]]:
    return lambda model, optimizer, run_dir: Recorder(model, optimizer, run_dir, every=every)


def off(*_: object) -> AbstractContextManager[object]:
    return nullcontext()


def arms() -> list[Arm]:
    return [
        Arm("off", off),
        Arm("off, again", off),
        Arm("attached, unmeasured", recorder(10**9)),
        Arm("every 10 steps", recorder(10)),
        Arm("every step", recorder(1)),
        Arm("bound, never fires", lambda _, optimizer, __: SpectralBound(optimizer, 1e3)),
        Arm("bound, tau 0.01", lambda _, optimizer, __: SpectralBound(optimizer, 0.01)),
    ]


class Training:
    """One arm's model, optimizer and attachment."""

    def __init__(self, arm: Arm, model: GPT, run_dir: Path) -> None:
        self.arm, self.model = arm, model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
        self.attached = arm.attach(model, self.optimizer, run_dir)

    def block(self, data: list[Tensor]) -> list[float]:
        seconds = []
        for tokens_bt in data:
            start_s = time.perf_counter()
            logits_btv = self.model(tokens_bt[:, :-1])
            loss = functional.cross_entropy(logits_btv.flatten(0, 1), tokens_bt[:, 1:].flatten())
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if isinstance(self.attached, Recorder):
                self.attached.step(loss=loss)
            seconds.append(time.perf_counter() - start_s)
        return seconds


def measure(shape: GPTShape, batch: int, rounds: int) -> list[Arm]:
    torch.manual_seed(0)
    model = GPT(shape)
    generator = torch.Generator().manual_seed(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as attached:
        trainings = [
            Training(arm, copy.deepcopy(model), Path(folder) / str(index)) for index, arm in enumerate(arms())
        ]
        for training in trainings:
            attached.enter_context(training.attached)
        for turn in range(-1, rounds):
            data = [
                torch.randint(0, 256, (batch, shape.context + 1), generator=generator) for _ in range(BLOCK)
            ]
            for index in range(len(trainings)):
                training = trainings[(index + turn) % len(trainings)]
                cpu_s = time.process_time()
                seconds = training.block(data)
                if turn >= 0:  # the first round warms up: allocator, layouts, power iteration
                    training.arm.blocks.append(seconds)
                    training.arm.cpu_s.append((time.process_time() - cpu_s) / BLOCK)
        return [training.arm for training in trainings]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=10, help="blocks of ten steps per arm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    shape = GPTShape(given.width, given.layers, given.heads, given.context)
    start_s = time.perf_counter()
    measured = measure(shape, given.batch, given.rounds)
    print(f"{shape}, batch {given.batch}, {given.threads} thread(s), {given.rounds * BLOCK} steps per arm")
    print(f"{'arm':24}{'ms per step':>12}{'over off':>10}{'CPU ms':>10}   goal")
    for arm in measured:
        by_block = arm.name == "every 10 steps"
        step_s = arm.step_s(by_block=by_block)
        ratio = step_s / measured[0].step_s(by_block=by_block)
        goal = GOALS.get(arm.name)
        verdict = "" if goal is None else f"   under {goal - 1:.0%}: {'met' if ratio < goal else 'missed'}"
        print(
            f"{arm.name:24}{1e3 * step_s:12.2f}{ratio - 1:+10.1%}{1e3 * statistics.median(arm.cpu_s):10.2f}{verdict}"
        )
    noise = [measured[1].step_s(by_block=way) / measured[0].step_s(by_block=way) - 1 for way in (False, True)]
    print(f"noise: the second off arm differs by {noise[0]:+.1%}, by blocks {noise[1]:+.1%}")
    print(f"took {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    main()
