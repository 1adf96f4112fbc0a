"""What stands between a projection and attention: nothing, a rotation, a norm, and the norm's gain.

q of a token is R (f * s y + b): y what was projected (its mean taken off, in a LayerNorm), s the norm's factor
for this token, f its gain, b a bias, R a rotation (RoPE). With the cotangent q itself the rotation cancels, so
the gradient of |q|^2 / 2 with respect to the gain is u * s y and with respect to the bias u, where
u = f * s y + b. A gain is believed where these hold for the true gradients, whatever the parameter's name.

Shape suffixes: H heads, T rows, K head size.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diagnostics.attach.graph import gradients

_TOKENS = 32
"""So many tokens of the first sequence tell what lies between; each tells it alone."""
_SPREAD = 1.02
"""A rotation keeps every token's norm, a fixed factor keeps their ratios, a norm layer keeps neither; half-precision
rounding stays below 1 %."""
_FULL = frozenset({torch.float32, torch.float64})


@dataclass(frozen=True)
class Gained:
    """A parameter that may be a gain or bias by feature.

    Attributes:
        tensor: the parameter.
        parameter: its name.
        at_hk: for each head and feature, the element.
        plus: added to it where it is a gain.
    """

    tensor: Tensor
    parameter: str
    at_hk: tuple[tuple[int, ...], ...]
    plus: float = 0.0

    def values_h1k(self) -> Tensor:
        flat = self.tensor.detach().reshape(-1).double()
        return flat[torch.tensor(self.at_hk, device=flat.device)][:, None] + self.plus

    @staticmethod
    def candidates(
        leaves: Sequence[Tensor],
        name_of: Callable[[Tensor], str | None],
        y_htk: Tensor,
        rows: Sequence[Sequence[int]] | None,
        features: int,
    ) -> list[list["Gained"]]:
        """For each parameter on the way whose size may be one value per feature, the ways its elements may be taken.

        Args:
            leaves: parameters met between the product and attention.
            name_of: their names.
            y_htk: what was projected.
            rows: the heads' features in the product, None where there are several products.
            features: how many the product has.
        """
        heads, _, size = y_htk.shape
        owner = (
            rows if rows is not None else [[head * size + k for k in range(size)] for head in range(heads)]
        )
        distinct = list(dict.fromkeys(tuple(row) for row in owner))
        found = []
        for leaf in leaves:
            ways: dict[tuple[tuple[int, ...], ...], None] = {}
            if leaf.numel() == size:
                ways[(tuple(range(size)),) * heads] = None
            if leaf.numel() == len(distinct) * size:
                starts = [distinct.index(tuple(row)) * size for row in owner]
                ways[tuple(tuple(range(start, start + size)) for start in starts)] = None
            if rows is not None and leaf.numel() == features:
                ways[tuple(tuple(row) for row in rows)] = None
            if ways and size > 1:
                name = name_of(leaf)
                found.append([Gained(leaf, name or "", way) for way in ways])
        return found


@dataclass(frozen=True)
class Between:
    """What was found.

    Attributes:
        flags: `rope`, `qk_norm`.
        gain: what the features are multiplied by, None where by nothing that is learned.
        elementwise: whether each feature of q is that feature of the projection, times a token's own factor.
    """

    flags: tuple[str, ...] = ()
    gain: Gained | None = None
    elementwise: bool = False


NOTHING = Between()


@dataclass(frozen=True)
class _Tokens:
    """The sampled tokens that show something, in float64."""

    x_htk: Tensor
    y_htk: Tensor
    weight_ht: Tensor
    tolerance: float


def between(x_bhtk: Tensor, y_htk: Tensor, candidates: Sequence[Sequence[Gained]]) -> Between | str:
    """What lies between, or a sentence where a parameter does whose part could not be verified.

    Args:
        x_bhtk: q or k as it enters attention, attached to the autograd graph.
        y_htk: what was projected for its first sequence.
        candidates: see `Gained.candidates`.
    """
    norm_ht = y_htk.double().norm(dim=-1)
    # The embedding of a padding token is zero, and so is what is projected from it: it shows nothing.
    shown_t = (norm_ht > 1e-6 * norm_ht.amax()).all(0).nonzero().flatten()
    if not shown_t.numel():
        return _unverified(candidates) if candidates else NOTHING
    at_t = shown_t[:: -(-shown_t.numel() // _TOKENS)]
    exact = {x_bhtk.dtype, y_htk.dtype} <= _FULL
    weight_ht = 1.0 + torch.arange(at_t.numel(), device=y_htk.device) % 3 + torch.zeros_like(norm_ht[:, :1])
    tokens = _Tokens(
        x_bhtk.detach()[0][:, at_t].double(), y_htk[:, at_t].double(), weight_ht, 1e-3 if exact else 5e-2
    )
    if not candidates:
        return _flags(tokens, *_plainest(tokens))
    true = _true_gradients(x_bhtk, tokens, at_t, [ways[0].tensor for ways in candidates])
    for gain, bias, centred in _hypotheses(candidates):
        s_ht, y = _factor(tokens, gain, bias, centred)
        if _holds(tokens, gain, bias, s_ht, y, true):
            if gain is not None and not gain.parameter:
                break
            f = 1.0 if gain is None else gain.values_h1k()
            b = 0.0 if bias is None else bias.values_h1k()
            return replace(_flags(tokens, s_ht, f * s_ht[..., None] * y + b), gain=gain)
    for gain, _, _ in _hypotheses(candidates) if len(candidates) == 1 else ():
        if gain is not None and gain.parameter and _is_last(tokens, gain, true):
            unscaled_htk = tokens.x_htk / gain.values_h1k()
            s_ht = unscaled_htk.norm(dim=-1) / tokens.y_htk.norm(dim=-1)
            found = _flags(replace(tokens, x_htk=unscaled_htk), s_ht, s_ht[..., None] * tokens.y_htk)
            return replace(found, gain=gain, elementwise=False)
    return _unverified(candidates)


def _unverified(candidates: Sequence[Sequence[Gained]]) -> str:
    names = ", ".join(ways[0].parameter or "a tensor" for ways in candidates)
    return f"{names} stands between the projection and attention in a way that could not be verified"


def _hypotheses(
    candidates: Sequence[Sequence[Gained]],
) -> Iterator[tuple[Gained | None, Gained | None, str]]:
    """Every role for every parameter: one gain, one bias at most, and all of them taken."""
    if len(candidates) == 1:
        roles = [(gain, None) for gain in candidates[0]]
        roles += [(replace(gain, plus=1.0), None) for gain in candidates[0]]
        pairs: list[tuple[Gained | None, Gained | None]] = [*roles, *((None, bias) for bias in candidates[0])]
    elif len(candidates) == 2:  # noqa: PLR2004 - a gain and a bias
        pairs = [
            (replace(gain, plus=plus), bias)
            for first, second in (candidates, candidates[::-1])
            for gain, bias in itertools.product(first, second)
            for plus in (0.0, 1.0)
        ]
    else:
        pairs = []
    for centred in ("", "head", "all"):
        for gain, bias in pairs:
            yield gain, bias, centred


def _factor(tokens: _Tokens, gain: Gained | None, bias: Gained | None, centred: str) -> tuple[Tensor, Tensor]:
    """The norm's factor of each token, from |q|, and the projection with its mean taken off."""
    y = _centred(tokens.y_htk, centred)
    v = y if gain is None else gain.values_h1k() * y
    square, length = v.square().sum(-1), tokens.x_htk.square().sum(-1)
    if bias is None:
        return (length / square.clamp_min(1e-300)).sqrt(), y
    b = bias.values_h1k().expand_as(v)
    cross, rest = (v * b).sum(-1), b.square().sum(-1) - length
    root = (cross.square() - square * rest).clamp_min(0.0).sqrt()
    # Where both roots are positive, the norm's own factor says which; a plain bias has the factor 1.
    low, high = (-cross - root) / square, (-cross + root) / square
    expected = torch.ones_like(low) if gain is None else y.square().mean(-1).rsqrt()
    return torch.where((low > 0) & ((low - expected).abs() < (high - expected).abs()), low, high), y


def _centred(y_htk: Tensor, centred: str) -> Tensor:
    if centred == "head":
        return y_htk - y_htk.mean(-1, keepdim=True)
    if centred == "all":
        return y_htk - y_htk.mean((0, 2), keepdim=True)
    return y_htk


def _true_gradients(
    x_bhtk: Tensor, tokens: _Tokens, at_t: Tensor, leaves: Sequence[Tensor]
) -> dict[int, Tensor]:
    cotangent = torch.zeros_like(x_bhtk)
    cotangent[0][:, at_t] = (tokens.x_htk * tokens.weight_ht[..., None]).to(x_bhtk.dtype)
    found = gradients(x_bhtk, cotangent, leaves)
    return {
        id(leaf): torch.zeros(leaf.numel()) if gradient is None else gradient.reshape(-1).double()
        for leaf, gradient in zip(leaves, found, strict=True)
    }


def _holds(
    tokens: _Tokens,
    gain: Gained | None,
    bias: Gained | None,
    s_ht: Tensor,
    y_htk: Tensor,
    true: dict[int, Tensor],
) -> bool:
    n_htk = s_ht[..., None] * y_htk
    u_htk = n_htk if gain is None else gain.values_h1k() * n_htk
    if bias is not None:
        u_htk = u_htk + bias.values_h1k()
    weighted = tokens.weight_ht[..., None] * u_htk
    expected = [(gain, (weighted * n_htk).sum(1)), (bias, weighted.sum(1))]
    for each, by_feature_hk in expected:
        if each is None:
            continue
        gradient = true[id(each.tensor)]
        at = torch.tensor(each.at_hk, device=by_feature_hk.device)
        summed = torch.zeros_like(gradient).index_add_(0, at.flatten(), by_feature_hk.flatten())
        if not bool((summed - gradient).abs().amax() <= tokens.tolerance * gradient.abs().amax()):
            return False
    return True


def _is_last(tokens: _Tokens, gain: Gained, true: dict[int, Tensor]) -> bool:
    """Whether the gain multiplies q last, after a rotation (HunYuan): its gradient then is that of q = f * (q / f)."""
    f_h1k = gain.values_h1k()
    if not bool((f_h1k != 0).all()):
        return False
    by_feature_hk = (tokens.weight_ht[..., None] * tokens.x_htk.square() / f_h1k).sum(1)
    gradient = true[id(gain.tensor)]
    at = torch.tensor(gain.at_hk, device=by_feature_hk.device)
    summed = torch.zeros_like(gradient).index_add_(0, at.flatten(), by_feature_hk.flatten())
    return bool((summed - gradient).abs().amax() <= tokens.tolerance * gradient.abs().amax())


def _plainest(tokens: _Tokens) -> tuple[Tensor, Tensor]:
    """Without learned parameters on the way: the factor, and the projection centred if that explains q."""
    s_ht, y_htk = _factor(tokens, None, None, "")
    for centred in ("head", "all"):
        other_ht, other_htk = _factor(tokens, None, None, centred)
        if _same(tokens, other_ht[..., None] * other_htk) and not _same(tokens, s_ht[..., None] * y_htk):
            return other_ht, other_ht[..., None] * other_htk
    return s_ht, s_ht[..., None] * y_htk


def _same(tokens: _Tokens, u_htk: Tensor) -> bool:
    """Whether q holds the same values, in whatever order."""
    limit = 2e-2 if tokens.tolerance > 1e-2 else 1e-3  # noqa: PLR2004 - half precision or not
    scale = tokens.x_htk.abs().amax(-1, keepdim=True)
    return bool(((u_htk.sort(-1).values - tokens.x_htk.sort(-1).values).abs() <= limit * scale).all())


def _flags(tokens: _Tokens, s_ht: Tensor, u_htk: Tensor) -> Between:
    spread_h = s_ht.amax(-1) / s_ht.amin(-1).clamp_min(1e-30)
    flags = []
    if not _same(tokens, u_htk):
        flags.append("rope")
    if bool((spread_h > _SPREAD).any()):
        flags.append("qk_norm")
    scale = tokens.x_htk.abs().amax(-1, keepdim=True)
    elementwise = bool(((u_htk - tokens.x_htk).abs() <= max(tokens.tolerance, 5e-3) * scale).all())
    return Between(tuple(flags), None, elementwise)
