"""How well a store is shuffled: the company that a row keeps in a batch.

Tokens of one context have much in common, so a batch with many of one context teaches less than its size says.
"""

import logging

import numpy as np

from saepipe.config import StreamConfig
from saepipe.errors import UserError
from saepipe.order import Blocks, Order, Place, choose_lanes
from saepipe.permutation import derive_key
from saepipe.plan import Plan

WORST = 1.05
"""Companions, relative to a uniform shuffle, from which a store counts as badly shuffled."""
_POOLS = 4
_log = logging.getLogger(__name__)


def companions(plan: Plan) -> float:
    """Measure a row's same-context companions in a batch, relative to a uniform shuffle of the store.

    The rows of a batch come from the windows that the stream's lanes have open. So this counts the pairs of one context
    in the windows of some batches (of the default stream, on the hook that is shuffled worst) and divides by how many
    there would be among as many rows of the whole store: 1 is uniform.

    Source of the measure: Corgi2 (arXiv 2309.01640), whose two-step shuffle this is.
    """
    stream = StreamConfig()
    hook = max(plan.hooks, key=lambda name: plan.block_rows[name])
    order = Order(
        Blocks.of(plan, [hook], None),
        derive_key("companions", plan.identity),
        lanes=(lanes := choose_lanes(stream)),
        batch_tokens=stream.batch_tokens,
        window_tokens=stream.window_tokens,
    )
    if not order.batches_per_epoch or plan.tokens <= stream.window_tokens:
        return 1.0  # the windows hold the whole store
    found = expected = 0.0
    for pool in range(_POOLS):
        row = order.batches_per_epoch * (2 * pool + 1) // (2 * _POOLS) * order.lane_batch
        places = [Place(0, lane, order.window_index(lane, row)) for lane in range(lanes)]
        tokens = np.concatenate([_tokens(plan, order, place) for place in places])
        _, counts = np.unique(tokens // plan.context_size, return_counts=True)
        found += float((counts * (counts - 1)).sum())
        expected += len(tokens) * (len(tokens) - 1) * (plan.context_size - 1) / (plan.tokens - 1)
    return found / expected if expected else 1.0


def _tokens(plan: Plan, order: Order, place: Place) -> np.ndarray:
    """Return the tokens that the rows of a window belong to."""
    window, blocks = order.window(place), order.blocks
    tokens = np.full(len(window.blocks) * blocks.block_rows, -1)
    for slot, block in enumerate(window.blocks.tolist()):
        shard, start = int(blocks.shard[block]), int(blocks.number[block]) * blocks.block_rows
        found = plan.row_tokens(shard, start, min(start + blocks.block_rows, plan.shard_rows(shard)))
        tokens[slot * blocks.block_rows :][: len(found)] = found
    return tokens[window.rows]


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
