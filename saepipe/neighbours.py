"""The latents whose decoder rows point the same way as a latent's own."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

_ROWS = 1 << 10


@torch.inference_mode()
def nearest(rows: Float[Tensor, "latent d_out"], n: int) -> tuple[Float[Tensor, "latent n"], Int[Tensor, "latent n"]]:
    """Find the n other rows with the largest cosines, falling, and which they are; fewer where there are fewer rows.

    Args:
        rows: Decoder rows.
        n: How many.
    """
    unit = functional.normalize(rows.float(), dim=1)
    n = min(n, max(len(rows) - 1, 0))
    values, indices = unit.new_zeros(len(rows), n), torch.zeros(len(rows), n, dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), _ROWS):
        cosines = unit[start : start + _ROWS] @ unit.T
        own = torch.arange(len(cosines), device=rows.device)
        cosines[own, own + start] = -torch.inf
        found = cosines.topk(n, dim=1)
        values[start : start + _ROWS], indices[start : start + _ROWS] = found.values, found.indices
    return values, indices
