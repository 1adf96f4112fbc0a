"""Which matrices a remedy acts on: parameters cut into the blocks that act as one matrix each.

A fused qkv weight is three matrices in one parameter; its largest singular value is that of the largest
block and hides the others, so remedies treat each block by itself.
"""

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diagnostics.attach.rules import candidate_sites
from diagnostics.attach.site import Projection, Site
from diagnostics.errors import DiagnosticsError

Select = nn.Module | Iterable[nn.Parameter] | Callable[[nn.Parameter], bool] | None


@dataclass(frozen=True)
class Block:
    """Some output features of one parameter, seen as a matrix.

    Attributes:
        parameter: the whole parameter.
        rows: the features of the block, None for all of them.
        transposed: whether features are columns.
    """

    parameter: nn.Parameter
    rows: Tensor | slice | None = None
    transposed: bool = False

    def of(self, values: Tensor) -> Tensor:
        """The block of a tensor of the parameter's shape, as a matrix (m, n); convolutions are flattened."""
        matrix = values.reshape(values.shape[0], -1)
        if self.rows is None:
            return matrix
        return matrix[:, self.rows] if self.transposed else matrix[self.rows]

    def put(self, values: Tensor, block: Tensor) -> None:
        """Writes a block back into a tensor of the parameter's shape, in place."""
        if self.rows is None:
            values.copy_(block.view_as(values))
        elif self.transposed:
            values[:, self.rows] = block
        else:
            values[self.rows] = block


def select_matrices(optimizer: torch.optim.Optimizer, select: Select) -> list[nn.Parameter]:
    """The parameters of an optimizer that a remedy acts on.

    Args:
        optimizer: its parameters are the candidates, each once.
        select: None: every parameter with two dimensions or more that is no embedding; a module or an
            iterable of parameters: those matrices; a callable: the matrices it says True to.

    Raises:
        ValueError: nothing is selected, or something selected is not in the optimizer.
    """
    owned = {id(p): p for group in optimizer.param_groups for p in group["params"]}
    matrices = [p for p in owned.values() if p.ndim >= 2 and p.is_floating_point()]  # noqa: PLR2004 - a matrix
    if select is None:
        embeddings = {
            id(module.weight)
            for module in _live_modules()
            if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        }
        chosen = [p for p in matrices if id(p) not in embeddings]
    elif isinstance(select, nn.Module):
        inside = {id(p) for p in select.parameters()}
        chosen = [p for p in matrices if id(p) in inside]
    elif callable(select):
        chosen = [p for p in matrices if select(p)]
    elif not isinstance(select, Iterable):
        raise DiagnosticsError(
            f"select is {select!r}; give parameters, a module, a callable on a parameter, or None"
        )
    else:
        given = [select] if isinstance(select, Tensor) else list(select)
        chosen = list({id(parameter): parameter for parameter in given}.values())
        for parameter in chosen:
            if not isinstance(parameter, Tensor):
                raise DiagnosticsError(
                    f"select holds {parameter!r}; give parameters, a module, a callable on a parameter, or None"
                )
            if id(parameter) not in owned:
                raise DiagnosticsError(
                    f"select names a parameter of shape {tuple(parameter.shape)} that the optimizer does not hold; "
                    "give parameters of this optimizer"
                )
            if parameter.ndim < 2:  # noqa: PLR2004 - a matrix
                raise DiagnosticsError(
                    f"select names a parameter of shape {tuple(parameter.shape)}; a vector has no largest singular value"
                )
    if not chosen:
        raise DiagnosticsError(
            "select leaves no matrix to bound; give None, a module, parameters, or a callable"
        )
    return chosen


def blocks_of(
    parameters: Sequence[nn.Parameter], model: nn.Module | None, sites: Sequence[Site] | None
) -> list[Block]:
    """The parameters as blocks: fused projections are cut where attention sites say so.

    Args:
        parameters: the matrices to act on.
        model: the module whose names the sites use; None: the live modules that own the parameters are
            looked up, and names tell (attach/rules.py).
        sites: the sites of `model`; None as above.
    """
    if model is not None and sites is not None:
        projections = _projections(model, sites)
    else:
        projections = [
            pair for module in _live_modules() for pair in _projections(module, candidate_sites_of(module))
        ]
    rows: dict[int, list[Projection]] = {}
    for parameter, projection in projections:
        if projection not in rows.setdefault(id(parameter), []):
            rows[id(parameter)].append(projection)
    return [block for parameter in parameters for block in _cut(parameter, rows.get(id(parameter), []))]


def candidate_sites_of(module: nn.Module) -> list[Site]:
    """The site that a module is by itself, without its submodules' sites."""
    return [site for site in candidate_sites(module) if site.name == ""] if _may_project(module) else []


def _may_project(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or len(module._modules) > 0  # noqa: SLF001 - cheaper than walking


def _projections(model: nn.Module, sites: Iterable[Site]) -> list[tuple[nn.Parameter, Projection]]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return [
        (parameters[projection.parameter], projection)
        for site in sites
        for projection in (site.query, site.key)
        if projection is not None and projection.parameter in parameters
    ]


def _cut(parameter: nn.Parameter, projections: Sequence[Projection]) -> list[Block]:
    if not projections or parameter.ndim != 2:  # noqa: PLR2004 - a matrix
        return [Block(parameter)]
    transposed = projections[0].transposed
    features = parameter.shape[1] if transposed else parameter.shape[0]
    rest = set(range(features))
    parts: list[list[int]] = []
    for projection in projections:
        part = sorted({row for head in projection.rows for row in head} & rest)
        if part:
            parts.append(part)
            rest -= set(part)
    if rest:
        parts.append(sorted(rest))
    if len(parts) == 1:
        return [Block(parameter)]
    return [Block(parameter, _as_index(part, parameter.device), transposed) for part in parts]


def _as_index(rows: list[int], device: torch.device) -> Tensor | slice:
    """A slice where the rows are contiguous: it makes a view instead of a copy."""
    if rows[-1] - rows[0] + 1 == len(rows):
        return slice(rows[0], rows[-1] + 1)
    return torch.tensor(rows, device=device)


def _live_modules() -> list[nn.Module]:
    # An optimizer knows parameters only. Whether one is an embedding or a fused projection is known to the
    # module that owns it, and every live module is known to the garbage collector; asked once, when armed.
    # type(), not isinstance(): the latter runs __class__ properties of strangers' proxies.
    return [thing for thing in gc.get_objects() if issubclass(type(thing), nn.Module)]
