"""The one shape rule that every attention measurement has."""

from torch import Tensor

from diagnostics.errors import DiagnosticsError

AXES = 4


def check_query_key_shapes(q_bhrk: Tensor, k_bgsk: Tensor) -> None:
    """Refuse queries (B, H, R, K) and keys (B, G, S, K) that cannot be paired, G dividing H.

    Raises:
        DiagnosticsError: names both shapes and what is wanted.
    """
    if (
        q_bhrk.ndim == k_bgsk.ndim == AXES
        and q_bhrk.shape[0] == k_bgsk.shape[0]
        and q_bhrk.shape[3] == k_bgsk.shape[3]
        and k_bgsk.shape[1] > 0
        and q_bhrk.shape[1] % k_bgsk.shape[1] == 0
    ):
        return
    raise DiagnosticsError(
        f"queries of shape {tuple(q_bhrk.shape)} and keys of shape {tuple(k_bgsk.shape)}; they must be "
        "(batch, heads, rows, d_head) and (batch, key heads, keys, d_head), the key heads dividing the heads"
    )
