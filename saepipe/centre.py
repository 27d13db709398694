"""The centre of what is reconstructed, where the decoder's bias starts."""

import torch
from jaxtyping import Float
from torch import Tensor

from saepipe import metrics
from saepipe.config import RunConfig
from saepipe.row_filter import RowFilter
from saepipe.store import Store
from saepipe.stream import Stream

MOST_ROWS = 65_536
"""Rows that a geometric median is taken of."""


def centre(config: RunConfig, store: Store, stream: Stream) -> Float[Tensor, " d_out"] | None:
    """Find the centre that `sae.b_dec_init_method` asks for; None is zero.

    The mean is the manifest's, of every ordinary row. The median is of the first ordinary rows that the stream keeps,
    in the order in which they lie on disk (shuffled when they were written), so that all ranks find the same.
    """
    hook, method = stream.target_hook or stream.hook, config.sae.b_dec_init_method
    if method == "zeros":
        return None
    if method == "geometric_median":
        hooks = [stream.hook] if stream.target_hook is None else [stream.hook, stream.target_hook]
        row_filter = RowFilter.of(config.stream, exclude_special_tokens=config.data.exclude_special_tokens)
        rows = first_rows(store, hook, row_filter, hooks)
        if len(rows):
            return metrics.geometric_median(rows)
    return store.statistics(hook).mean


def first_rows(store: Store, hook: str, row_filter: RowFilter, hooks: list[str]) -> Float[Tensor, "token d"]:
    """Read the first ordinary training rows of a hook that a filter keeps."""
    found: list[Tensor] = []
    missing = MOST_ROWS
    size = store.plan.block_rows[hook]
    for shard in range(store.plan.n_shards):
        kept = torch.from_numpy(row_filter.mask(store, hooks, shard) & store.ordinary(shard))
        for block in range(store.plan.n_blocks(hook, shard)):
            if not missing:
                return torch.cat(found)
            rows = store.read_block(hook, shard, block)
            found.append(rows[kept[block * size :][: len(rows)]][:missing])
            missing -= len(found[-1])
    return torch.cat(found)
