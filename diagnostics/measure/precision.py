"""What every measurement asks of torch: no graph, and no autocast rounding its products to 16 bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradient is recorded and autocast is off, in this thread and this block only.

    Measurements run inside the user's forward pass, where autocast would turn a float32 product into bfloat16:
    an error of 1e-2 nats and more in the entropies of collapsed heads, just where they matter.
    TF32 is a process-wide switch (`torch.set_float32_matmul_precision`) and is left as the user set it; with it
    on, float32 products on CUDA carry relative errors near 1e-3.

    Args:
        device: where the tensors of the block live.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield
