"""Name rules: what the names and shapes of a module's parameters suggest, before any forward was seen.

They answer at once and are often right; a probe at the first measured step checks them (probe.py), because
the same name stands for different layouts in different libraries.
"""

from torch import Tensor, nn

from diagnostics.attach.site import Projection, Site, contiguous_rows

_FUSED = (
    "qkv",
    "c_attn",
    "Wqkv",
    "wqkv",
    "to_qkv",
    "qkv_proj",
    "query_key_value",
    "in_proj",
    "attn_qkv",
    "c_qkv",
)
_PAIRS = (
    ("q_proj", "k_proj"), ("query", "key"), ("queries", "keys"), ("q", "k"), ("to_q", "to_k"), ("wq", "wk"),
    ("Wq", "Wk"), ("w_q", "w_k"), ("W_q", "W_k"), ("W_Q", "W_K"), ("q_lin", "k_lin"), ("q_linear", "k_linear"),
    ("linear_q", "linear_k"), ("query_proj", "key_proj"), ("fc_q", "fc_k"), ("proj_q", "proj_k"), ("q_fc", "k_fc"),
    ("query_projection", "key_projection"), ("query_layer", "key_layer"),
)  # fmt: skip
_HEADS = (
    "num_heads",
    "n_head",
    "n_heads",
    "nhead",
    "heads",
    "num_attention_heads",
    "nheads",
    "n_local_heads",
    "h",
    "head_num",
    "attention_heads",
)
_HEAD_DIM = (
    "head_dim",
    "head_size",
    "dim_head",
    "d_head",
    "attention_head_size",
    "d_k",
    "dk",
    "per_head_dim",
)


def candidate_sites(model: nn.Module) -> list[Site]:
    """The sites that names suggest, in module order, none of them verified."""
    return [site for name, module in model.named_modules() if (site := _candidate(name, module)) is not None]


def _candidate(name: str, module: nn.Module) -> Site | None:
    if isinstance(module, nn.MultiheadAttention):
        return _multihead_attention(name, module)
    children = dict(module.named_children())
    heads = _number(module, _HEADS)
    for fused in _FUSED:
        if (weight := _matrix(children.get(fused))) is not None:
            return _fused(name, fused, children[fused], weight, module, heads)
    for query, key in _PAIRS:
        query_weight, key_weight = _matrix(children.get(query)), _matrix(children.get(key))
        if query_weight is not None and key_weight is not None:
            return _separate(name, (query, key), (children[query], children[key]), module, heads)
    return None


def _multihead_attention(name: str, module: nn.MultiheadAttention) -> Site:
    prefix = f"{name}." if name else ""
    heads, head_dim = module.num_heads, module.head_dim
    if module._qkv_same_embed_dim:  # noqa: SLF001 - in_proj_weight is None otherwise, which its type denies
        layout, parameters = (
            "one matrix, rows [q heads; k heads; v heads]",
            ("in_proj_weight", "in_proj_weight"),
        )
        key_start = module.embed_dim
    else:
        layout, parameters, key_start = "separate q and k", ("q_proj_weight", "k_proj_weight"), 0
    return Site(
        name, heads, heads, head_dim, layout=layout,
        query=Projection(prefix + parameters[0], contiguous_rows(0, heads, head_dim)),
        key=Projection(prefix + parameters[1], contiguous_rows(key_start, heads, head_dim)),
        kv_head=tuple(range(heads)),
    )  # fmt: skip


def _fused(
    name: str, child: str, layer: nn.Module, weight: Tensor, module: nn.Module, heads: int | None
) -> Site:
    width, out, transposed = _orientation(layer, weight)
    head_dim = _number(module, _HEAD_DIM) or (width // heads if heads and width % heads == 0 else None)
    if heads is None and head_dim and out % (3 * head_dim) == 0:
        heads = out // (3 * head_dim)
    if not heads or not head_dim:
        return Site(name, heads, None, head_dim)
    kv_heads, rest = divmod(out - heads * head_dim, 2 * head_dim)
    if rest or kv_heads < 1 or heads % kv_heads:
        return Site(name, heads, None, head_dim)
    parameter = f"{name}.{child}.weight" if name else f"{child}.weight"
    side = "columns" if transposed else "rows"
    return Site(
        name, heads, kv_heads, head_dim, layout=f"one matrix, {side} [q heads; k heads; v heads]",
        query=Projection(parameter, contiguous_rows(0, heads, head_dim), transposed),
        key=Projection(parameter, contiguous_rows(heads * head_dim, kv_heads, head_dim), transposed),
        kv_head=tuple(head // (heads // kv_heads) for head in range(heads)),
    )  # fmt: skip


def _separate(
    name: str,
    children: tuple[str, str],
    layers: tuple[nn.Module, nn.Module],
    module: nn.Module,
    heads: int | None,
) -> Site:
    weights = [weight for layer in layers if (weight := _matrix(layer)) is not None]
    (_, query_out, query_transposed), (_, key_out, key_transposed) = (
        _orientation(layer, weight) for layer, weight in zip(layers, weights, strict=True)
    )
    head_dim = _number(module, _HEAD_DIM)
    if heads is None and head_dim and query_out % head_dim == 0:
        heads = query_out // head_dim
    if head_dim is None and heads and query_out % heads == 0:
        head_dim = query_out // heads
    if not heads or not head_dim or heads * head_dim != query_out or key_out % head_dim:
        return Site(name, heads, None, head_dim)
    kv_heads = key_out // head_dim
    if heads % kv_heads:
        return Site(name, heads, None, head_dim)
    prefix = f"{name}." if name else ""
    return Site(
        name, heads, kv_heads, head_dim, layout="separate q and k",
        query=Projection(f"{prefix}{children[0]}.weight", contiguous_rows(0, heads, head_dim), query_transposed),
        key=Projection(f"{prefix}{children[1]}.weight", contiguous_rows(0, kv_heads, head_dim), key_transposed),
        kv_head=tuple(head // (heads // kv_heads) for head in range(heads)),
    )  # fmt: skip


def _orientation(layer: nn.Module, weight: Tensor) -> tuple[int, int, bool]:
    """In features, out features, and whether the weight is (in, out); a layer that is no Linear says so by name."""
    transposed = type(layer).__name__ == "Conv1D" and not isinstance(layer, nn.Conv1d)
    rows, columns = weight.shape
    return (rows, columns, True) if transposed else (columns, rows, False)


def _matrix(layer: nn.Module | None) -> Tensor | None:
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) and weight.ndim == 2 else None  # noqa: PLR2004 - a matrix


def _number(module: nn.Module, names: tuple[str, ...]) -> int | None:
    for owner in (module, getattr(module, "config", None), getattr(module, "args", None)):
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
