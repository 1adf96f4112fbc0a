"""The arms of the demonstration: one failing run, its healthy reference, and two ways of curing it."""

from dataclasses import dataclass

from diagnostics.demo.gpt import GPTShape

TAU = 0.01
PEAK_LR = 3e-3
WARMUP_STEPS = 100
STEPS = 300
BATCH_SIZE = 16
EVERY = 10
SHAPE = GPTShape(width=128, layers=4, heads=4, context=128)


@dataclass(frozen=True)
class Arm:
    """One training run of the demonstration; all share seed, data order and peak learning rate.

    Attributes:
        name: of the run directory.
        meaning: one sentence for people.
        warmup_steps: linear learning-rate warmup, 0: full rate from the first step.
        bound_from_start: whether the spectral bound is armed before the first step.
        rescued: whether another process arms the bound on the way.
    """

    name: str
    meaning: str
    warmup_steps: int = 0
    bound_from_start: bool = False
    rescued: bool = False


ARMS = (
    Arm("gpt-warmup", "AdamW with learning-rate warmup, the healthy reference", warmup_steps=WARMUP_STEPS),
    Arm("gpt-no-warmup", "AdamW at the full rate from the first step"),
    Arm(
        "gpt-no-warmup-bound",
        "the same, with the spectral bound armed from the first step",
        bound_from_start=True,
    ),
    Arm("gpt-rescued", "the same, with the bound armed by another process at the first alert", rescued=True),
)


def learning_rate(arm: Arm, step: int) -> float:
    """Linear warmup to the peak, then constant."""
    if step < arm.warmup_steps:
        return PEAK_LR * (step + 1) / arm.warmup_steps
    return PEAK_LR
