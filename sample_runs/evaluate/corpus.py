"""The courses that are scored: training runs with labels, as `sample_runs/corpus` packed them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diagnostics.detect.block import Block, Values
from diagnostics.errors import DiagnosticsError

CORPUS = Path(__file__).resolve().parent.parent / "corpus"
HEALTHY, SPIKE, NEVER, CRASH, DEGRADED = "healthy", "spike-recovered", "never-learned", "crash", "degraded"
LABELS = (HEALTHY, SPIKE, NEVER, CRASH, DEGRADED)
FAILING = (NEVER, CRASH)


@dataclass(frozen=True)
class Course:
    """One labelled training run.

    Attributes:
        name, family, cause, seed: which run it is; `family` is what is held out.
        label: one of `LABELS`, from the loss alone.
        onset: first step at which the loss shows the failure or the spike; None where it shows none.
        recovered: step from which a spike is over; None where there was none.
        about: the recipe's fields, and under `sites` the attention sites with their flags.
        block: the whole run as the detectors are fed it.
    """

    name: str
    family: str
    cause: str
    seed: int
    label: str
    onset: int | None
    recovered: int | None
    about: Mapping[str, Any]
    block: Block

    @property
    def failing(self) -> bool:
        return self.label in FAILING

    @property
    def steps(self) -> int:
        """Steps trained."""
        return len(self.block.every_step)


def load_corpus(folder: Path = CORPUS) -> list[Course]:
    """All courses whose table lies in `folder`/tables, by name.

    Raises:
        DiagnosticsError: there is none.
    """
    paths = sorted((folder / "tables").glob("*.npz"))
    if not paths:
        raise DiagnosticsError(f"no *.npz in {folder / 'tables'}: `make corpus` makes them")
    return [load_course(path) for path in paths]


def load_course(path: Path) -> Course:
    """One packed table.

    Raises:
        DiagnosticsError: its label is none of `LABELS`, or it fails at no step.
    """
    with np.load(path, allow_pickle=False) as packed:
        arrays = {name: packed[name] for name in packed.files}
    about = json.loads(arrays["about"].item())
    label, onset = about["label"], about["onset"]
    if label not in LABELS:
        raise DiagnosticsError(f"{path}: label is {label!r}, not one of {', '.join(LABELS)}")
    if label in FAILING and onset is None:
        raise DiagnosticsError(f"{path}: a run labelled {label} needs the step of its onset")
    return Course(
        name=path.stem,
        family=about["family"],
        cause=about["cause"],
        seed=about["seed"],
        label=label,
        onset=onset,
        recovered=about.get("recovered"),
        about=about,
        block=_block(arrays),
    )


def _block(arrays: Mapping[str, NDArray[Any]]) -> Block:
    def table(prefix: str) -> dict[str, Values]:
        return {
            name.removeprefix(prefix): values.astype(np.float64)
            for name, values in arrays.items()
            if name.startswith(prefix)
        }

    return Block(
        steps=arrays["steps"].astype(np.int64),
        every_step=arrays["every_step"].astype(np.int64),
        ends=arrays["ends"].astype(np.int64),
        losses=arrays["losses"].astype(np.float64),
        loss_given=arrays["loss_given"].astype(np.bool_),
        scalars=table("scalars."),
        heads=tuple((str(layer), int(head)) for layer, head in json.loads(arrays["heads"].item())),
        attention=table("attention."),
        spectra=table("spectra."),
        parameters=tuple(json.loads(arrays["parameters"].item())),
        updates=table("updates."),
    )
