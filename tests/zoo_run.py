"""Recording the zoo: one measured step of a case beside its reference, and twin trainings with and without.

Shape suffixes: H query heads, K head size, D input features.
"""

import copy
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as module_hooks
from torch.overrides import _get_current_function_mode
from zoo_case import Array, Case, Heads
from zoo_reference import reference

from diagnostics.attach.site import Sites
from diagnostics.errors import NoAttentionError, RecorderWarning
from diagnostics.record.recorder import Recorder
from diagnostics.store.read import open_run

# Small matrices are slower with more, and the machine is shared with other tests.
torch.set_num_threads(1)

DROPOUT = 0.1


@dataclass(frozen=True)
class Recorded:
    """What the recorder said of one measured step, and what is true.

    Attributes:
        sites: as after the step.
        attention, spectra: tables of the step.
        warned: what the recorder warned of.
        faults: what it noted as its own faults.
        refused: why it would not attach, empty where it did.
        left: what it had hooked, patched or changed and did not undo.
        expected: what is known by hand.
        answers: attention columns by site and head in float64.
    """

    sites: Sites
    attention: pd.DataFrame
    spectra: pd.DataFrame
    warned: tuple[str, ...]
    faults: tuple[str, ...]
    refused: str
    left: list[str]
    expected: dict[str, Heads]
    answers: dict[str, list[dict[str, float]]]

    @property
    def single(self) -> dict[str, Heads]:
        """The sites whose heads have one Wq and one Wk."""
        return {name: heads for name, heads in self.expected.items() if not heads.mixed}


def record(case: Case, run_dir: Path) -> Recorded:
    """One training step of a case, measured."""
    model = case.build(0.0)
    expected = case.sites(model)
    assert expected or case.skipped, f"{case.name}: the case itself finds none of its sites"
    answers = reference(case, model, {name: len(heads.wq) for name, heads in expected.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    before = _surroundings(model, optimizer)
    with _collected_warnings() as warned:
        try:
            recorder = Recorder(model, optimizer, run_dir, every=1)
        except NoAttentionError as error:
            return Recorded(
                Sites(), pd.DataFrame(), pd.DataFrame(), (), (), str(error), [], expected, answers
            )
        with recorder:
            loss = case.loss(model)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    after = _surroundings(model, optimizer)
    run = open_run(run_dir)
    faults = tuple(str(fault["error"]) for fault in run.info["faults"])
    own = tuple(str(w.message) for w in warned if issubclass(w.category, RecorderWarning))
    left = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    return Recorded(recorder.sites, run.attention(), run.spectra(), own, faults, "", left, expected, answers)


@contextmanager
def _collected_warnings() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as collected:
        warnings.simplefilter("always")
        yield collected


def head_rows(frame: pd.DataFrame, site: str) -> pd.DataFrame:
    """A site's rows by head; none where the table holds nothing."""
    return frame[frame["layer"] == site].sort_values("head") if len(frame) else frame


def true_spectra(heads: Heads) -> list[Array]:
    """Singular values of each head's Wq^T Wk, of the whole D x D product, descending."""
    pairs = zip(heads.wq, heads.wk, strict=True)
    return [np.asarray(np.linalg.svd(wq.T @ wk, compute_uv=False), dtype=np.float64) for wq, wk in pairs]


def spectra_error(recorded: Recorded, site: str) -> float:
    """Largest error of a singular value relative to its head's largest; infinite where a head has none."""
    rows = head_rows(recorded.spectra, site)
    truths = true_spectra(recorded.expected[site])
    if len(rows) != len(truths):
        return float("inf")
    worst = 0.0
    for values, truth in zip(rows["singular_values"], truths, strict=True):
        if values is None or len(values) > len(truth):
            return float("inf")
        found = np.zeros_like(truth)
        found[: len(values)] = values
        worst = max(worst, float(np.abs(found - truth).max() / truth[0]))
    return worst


def attention_error(recorded: Recorded, site: str, column: str) -> float:
    """Largest error of an attention column over the site's heads; infinite where a head has none."""
    rows = head_rows(recorded.attention, site)
    truths = np.array([answer[column] for answer in recorded.answers[site]])
    if len(rows) != len(truths):
        return float("inf")
    errors = np.abs(rows[column].to_numpy(dtype=np.float64) - truths)
    return float("inf") if bool(np.isnan(errors).any()) else float(errors.max())


def largest_logit(recorded: Recorded, site: str) -> float:
    """The scale that a logit's error is to be seen against, at least 1."""
    return max(1.0, *(abs(answer["max_logit"]) for answer in recorded.answers[site]))


def twins(case: Case, run_dir: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two trainings from the same weights and random state, the second one recorded."""
    plain = case.build(DROPOUT)
    watched = copy.deepcopy(plain)
    return _trained(case, plain, None), _trained(case, watched, run_dir)


def _trained(case: Case, model: nn.Module, run_dir: Path | None, steps: int = 2) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen: dict[str, Any] = {"losses": [], "gradients": []}
    torch.manual_seed(0)
    recorder = None if run_dir is None else _attached(model, optimizer, run_dir)
    for _ in range(steps):
        loss, gradients = _one_step(case, model, optimizer, recorder)
        seen["losses"].append(loss)
        seen["gradients"].append(gradients)
    if recorder is not None:
        recorder.close()
    # Buffers too: an additional forward would have moved the statistics of a batch norm.
    seen["state"] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen["random"] = torch.get_rng_state()
    return seen


def _attached(model: nn.Module, optimizer: torch.optim.Optimizer, run_dir: Path) -> Recorder | None:
    """A recorder that measures every step, None where the model has no attention and it therefore refuses."""
    with _collected_warnings():
        try:
            return Recorder(model, optimizer, run_dir, every=1)
        except NoAttentionError:
            return None


def _one_step(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, recorder: Recorder | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """One training step; its loss and gradients."""
    with _collected_warnings():
        loss = case.loss(model)
        loss.backward()
        optimizer.step()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        optimizer.zero_grad()
        if recorder is not None:
            recorder.step(loss=loss)
    return loss.detach().clone(), gradients


def _surroundings(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a recorder could have hooked, patched or left behind."""
    found: dict[str, Any] = {
        "global hooks": [
            len(hooks) for name, hooks in sorted(vars(module_hooks).items()) if _is_hook_table(name)
        ],
        "mode": _get_current_function_mode(),
        "functions": [id(getattr(functional, name)) for name in _PATCHABLE],
        "optimizer": (type(optimizer), _hook_counts(optimizer)),
    }
    for name, module in model.named_modules():
        found[name] = (type(module), sorted(vars(module)), _hook_counts(module))
    interfaces = sys.modules.get("transformers.modeling_utils")
    if interfaces is not None:
        found["attention functions"] = dict(interfaces.ALL_ATTENTION_FUNCTIONS)
    return found


_PATCHABLE = ("scaled_dot_product_attention", "multi_head_attention_forward", "softmax", "linear")


def _is_hook_table(name: str) -> bool:
    return name.startswith("_global_") and name.endswith("hooks")


def _hook_counts(owner: object) -> dict[str, int]:
    return {
        name: len(value)
        for name, value in vars(owner).items()
        if name.endswith("hooks") and value is not None
    }


def differences(plain: Any, watched: Any, path: str = "") -> list[str]:
    """Names of everything that is not the same bits in both."""
    if isinstance(plain, Tensor):
        same = (
            plain.shape == watched.shape
            and plain.dtype == watched.dtype
            and torch.equal(_bits(plain), _bits(watched))
        )
        return [] if same else [path]
    items = list(plain.items()) if isinstance(plain, dict) else list(enumerate(plain))
    others = dict(watched.items() if isinstance(watched, dict) else enumerate(watched))
    found = [] if len(items) == len(others) else [f"{path} (other entries)"]
    for key, value in items:
        found += (
            differences(value, others[key], f"{path}/{key}") if key in others else [f"{path}/{key} (missing)"]
        )
    return found


def _bits(tensor: Tensor) -> Tensor:
    """As integers, so that NaN equals itself and -0 differs from 0."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)
