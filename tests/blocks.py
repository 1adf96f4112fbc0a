"""Courses drawn by hand, as blocks for the detectors."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from diagnostics.detect.block import ATTENTION, SCALARS, SPECTRA, UPDATES, Block

HEADS = tuple((f"blocks.{layer}.attn", head) for layer in range(2) for head in range(4))
PARAMETERS = ("blocks.0.attn.q_proj.weight", "blocks.1.attn.q_proj.weight")
Course = Callable[[int], Mapping[str, Any]]


def block_of(
    course: Course,
    steps: int,
    *,
    every: int = 10,
    heads: tuple[tuple[str, int], ...] = HEADS,
    parameters: tuple[str, ...] = PARAMETERS,
) -> Block:
    """A frame every so many steps and one more at the end.

    `course` gives by step the loss, the scalars, and per head or parameter a number (for all of them) or one each.
    What it leaves out was not observed.
    """
    every_step = np.arange(steps)
    ends = np.arange(0, steps, every) + 1
    if ends[-1] != steps:
        ends = np.append(ends, steps)
    frames = every_step[ends - 1]
    told = [course(int(step)) for step in every_step]

    def per_step(name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        return np.array([one.get(name, np.nan) for one in told], dtype=np.float64)

    def columns(names: tuple[str, ...], width: int) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        present = [name for name in names if any(name in told[step] for step in frames)]
        return {
            name: np.array(
                [
                    np.broadcast_to(
                        np.asarray(told[step].get(name, np.nan) if step % every == 0 else np.nan, float),
                        width,
                    )
                    for step in frames
                ]
            )
            for name in present
        }

    attention, spectra = columns(ATTENTION, len(heads)), columns(SPECTRA, len(heads))
    updates = columns(UPDATES, len(parameters))
    return Block(
        steps=frames,
        measured=frames % every == 0,
        every_step=every_step,
        ends=ends,
        losses=per_step("loss"),
        loss_given=np.array(["loss" in one for one in told]),
        scalars={name: per_step(name) for name in SCALARS},
        heads=heads if attention or spectra else (),
        attention=attention,
        spectra=spectra,
        parameters=parameters if updates else (),
        updates=updates,
    )


def in_parts(block: Block, cuts: list[int]) -> list[Block]:
    """The block cut before the frames of these indices."""
    edges = [0, *sorted(set(cuts)), len(block)]
    return [block.part(first, last) for first, last in pairwise(edges) if last > first]
