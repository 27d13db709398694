"""The processes that train together, each on its part of the global batch, and what they tell each other.

What is a statistic of the batch is a statistic of the global batch, so that any number of ranks trains the same SAE.
Every rank calls the same of these functions in the same order; alone, each of them gives back what it was given.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """The ranks, seen from one of them; those of the default process group of `torch.distributed`."""

    rank: int = 0
    """Number of this process."""
    world_size: int = 1
    """How many processes there are."""

    def sum(self, mine: Shaped[Tensor, "*any"]) -> Shaped[Tensor, "*any"]:
        """Replace a tensor by its sum over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(mine, dist.ReduceOp.SUM)
        return mine

    def least(self, mine: Shaped[Tensor, "*any"]) -> Shaped[Tensor, "*any"]:
        """Replace a tensor by its smallest values over the ranks."""
        if self.world_size > 1:
            dist.all_reduce(mine, dist.ReduceOp.MIN)
        return mine

    def lanes(self, mine: Shaped[Tensor, "token *any"], lanes: int) -> Shaped[Tensor, "batch *any"]:
        """Put what the ranks have for their tokens together, in the order of the global batch.

        Args:
            mine: A value or more for each token of this rank.
            lanes: Number of lanes of the stream, of which rank r serves r, r + world_size ...
        """
        if self.world_size == 1:
            return mine
        parts = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(parts, mine.contiguous())
        in_lanes = [part.reshape(lanes // self.world_size, -1, *mine.shape[1:]) for part in parts]
        return torch.stack(in_lanes, dim=1).reshape(-1, *mine.shape[1:])


ALONE = Ranks()
"""A process by itself."""
