"""How well a store is shuffled: the company that a row keeps in a batch.

Tokens of one context have much in common, so a batch with many of one context teaches less than its size says.
"""

import logging

import numpy as np

from saepipe.config import StreamConfig
from saepipe.errors import UserError
from saepipe.plan import Plan

WORST = 1.05
"""Companions, relative to a uniform shuffle, from which a store counts as badly shuffled."""
_BLOCKS = 64
_log = logging.getLogger(__name__)


def companions(plan: Plan) -> float:
    """Work out a row's same-context companions in a batch, relative to a uniform shuffle of the store.

    A batch is drawn from the windows that the stream's lanes are in, which hold blocks in random order (of the
    default stream, and of the hook that is shuffled worst). So a row meets all companions of its own block, which are
    counted in some blocks, and of the others as many as chance gives it; 1 is as good as uniform. Counting pairs in
    some windows instead was 4 % off for a billion rows, which refused good stores.

    Source of the measure: Corgi2 (arXiv 2309.01640), whose two-step shuffle this is.
    """
    window, block = StreamConfig().window_tokens, max(plan.block_rows.values())
    others = plan.context_size - 1
    if plan.tokens <= window or not others:
        return 1.0  # the windows hold the whole store, or there are no companions
    own = _in_own_block(plan, block)
    found = own + (others - own) * (window - block) / (plan.tokens - block)
    return found / (others * (window - 1) / (plan.tokens - 1))


def _in_own_block(plan: Plan, block: int) -> float:
    """Count the companions that a row has in its own block: the mean over blocks from all over the store."""
    rows = pairs = 0
    for number in range(_BLOCKS):
        shard = number * plan.n_shards // _BLOCKS
        start = number % -(-plan.shard_rows(shard) // block) * block
        tokens = plan.row_tokens(shard, start, min(start + block, plan.shard_rows(shard)))
        _, counts = np.unique(tokens // plan.context_size, return_counts=True)
        rows, pairs = rows + len(tokens), pairs + int((counts * (counts - 1)).sum())
    return pairs / rows


def check(plan: Plan, *, refuse: bool) -> float:
    """Measure the `companions` of a store that is about to be made.

    Args:
        plan: Its plan.
        refuse: Refuse a bad shuffle instead of warning of it.

    Raises:
        UserError: The shuffle is bad; names the size that would do.
    """
    ratio = companions(plan)
    if ratio <= WORST:
        return ratio
    block = max(plan.block_rows.values())
    enough = -(-block * plan.context_size // plan.shard_tokens) * plan.shard_tokens
    message = (
        f"store.shuffle_tokens={plan.shuffle_tokens} shuffles too few contexts together: a row meets {ratio:.2f} times "
        f"as many of its own context in a batch as chance would give it (at most {WORST}); give at least {enough}"
    )
    if refuse:
        raise UserError(f"{message}, or set cache.poor_shuffle=warn")
    _log.warning(message)
    return ratio
