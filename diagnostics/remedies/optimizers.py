"""Telling torch optimizers from what wraps them, and what their steps are given."""

from collections.abc import Mapping

import torch


def unwrapped(optimizer: object) -> object:
    """The torch optimizer inside wrappers such as accelerate's, on which hooks would raise or never be called.

    Accelerate's is an `Optimizer` by its class, but never initialised as one; a wrapper that is one in full
    (lookahead, say) is left as it is: its own step is the whole step.
    """
    while not _takes_hooks(optimizer) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def takes_closure(args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    """Whether a step was given a closure, from the arguments that torch hands to a step's pre-hook."""
    # torch has put the optimizer itself first.
    return kwargs.get("closure") is not None or any(callable(argument) for argument in args[1:])


def _takes_hooks(optimizer: object) -> bool:
    return isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "_optimizer_step_pre_hooks")
