"""The order in which training reads a store: shuffled, divided into lanes for ranks to share, known at any batch.

In full, for somebody who wants to reproduce it (divisions are whole; `Permutation` and `derive_key` are those of
`saepipe.permutation`; hook, seed, batch_tokens, window_tokens and lanes those of the `stream` group):

    key = derive_key("stream", identity of the plan, hook, target_hook or "", seed, batch_tokens, window_tokens, lanes,
                     text of the filter)

1. Rows. The natural order of a hook's rows is shard after shard, row after row. The filter (`saepipe.row_filter`) drops
   some of them. The blocks of a pair of hooks are the larger of the two.
2. Epoch e. The n blocks of the hook, natural order, are rearranged: place j holds block
   Permutation(derive_key("blocks", key, e), n)(j). The kept rows of the blocks in this new order, each block's rows in
   natural order, are one sequence of K rows.
3. Lanes. Lane l owns the K' = K // lanes rows from l * K' on. A block on the border is read for two lanes.
4. Windows. W = max(1, window_tokens // lanes) and shift = W * l // lanes. Window w of lane l is the lane's rows from
   w * W - shift to before (w + 1) * W - shift, cut to 0 ... K'. Place p of a window of m rows holds its row
   Permutation(derive_key("rows", key, e, l, w), m)(p). The shift makes the lanes change windows one after the other.
5. Batches. b = batch_tokens // lanes, and an epoch has K' // b batches. Batch i takes places i * b to before
   (i + 1) * b of every lane, lane after lane. Batch g of the stream is batch g % batches_per_epoch of epoch
   g // batches_per_epoch.
6. Ranks. Rank r of `world_size` serves lanes r, r + world_size, ... of every batch.

So a batch depends on its number alone: nothing but that number is needed to resume, on any number of ranks that divides
the lanes. An epoch leaves out less than one batch plus one row a lane, other rows in every epoch.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from saepipe.config import StreamConfig
from saepipe.permutation import Permutation, derive_key
from saepipe.plan import Plan


@dataclass(frozen=True)
class Blocks:
    """The blocks of a hook, or of a pair of them, in natural order, and which of their rows are kept."""

    block_rows: int
    """Rows per block; the last block of a shard may have fewer."""
    shard: Int64[np.ndarray, " block"]
    """Shard that the block lies in."""
    number: Int64[np.ndarray, " block"]
    """Number of the block in its shard."""
    first_row: Int64[np.ndarray, " block"]
    """Number of the block's first row in natural order."""
    kept: Int64[np.ndarray, " block"]
    """Rows that are kept."""
    bits: UInt8[np.ndarray, "block byte"]
    """Which rows these are: one bit a row, since a mask of bytes would be 1 GB for a billion rows."""

    @classmethod
    def of(cls, plan: Plan, hooks: Sequence[str], mask: Callable[[int], Bool[np.ndarray, " token"]] | None) -> "Blocks":
        """Count the kept rows of every block.

        Args:
            plan: Plan of the store.
            hooks: Hooks that are read together.
            mask: Tells which rows of a shard are kept; None keeps all.
        """
        block_rows = max(plan.block_rows[hook] for hook in hooks)

        def shard_mask(shard: int) -> tuple[UInt8[np.ndarray, "block byte"], Int64[np.ndarray, " block"]]:
            rows = plan.shard_rows(shard)
            kept = np.zeros((-(-rows // block_rows), block_rows), bool)
            kept.reshape(-1)[:rows] = True if mask is None else mask(shard)
            return np.packbits(kept, axis=1), kept.sum(axis=1)

        shards = range(plan.n_shards)
        with ThreadPoolExecutor() as pool:  # about 0.1 us a row, nearly all of it in numpy, which lets threads run
            masks = list(pool.map(shard_mask, shards))
        numbers = [np.arange(len(kept)) for _, kept in masks]
        return cls(
            block_rows=block_rows,
            shard=np.repeat(np.arange(len(shards)), [len(kept) for _, kept in masks]),
            number=np.concatenate(numbers),
            first_row=np.concatenate(
                [plan.shard_start(shard) + block_rows * n for shard, n in zip(shards, numbers, strict=True)]
            ),
            kept=np.concatenate([kept for _, kept in masks]),
            bits=np.concatenate([bits for bits, _ in masks]),
        )


class Place(NamedTuple):
    """Which window of the stream."""

    epoch: int
    lane: int
    number: int


@dataclass(frozen=True)
class Window:
    """What a window is made of."""

    place: Place
    start: int
    """First row of the lane in the window."""
    stop: int
    """Row of the lane that the window ends before."""
    blocks: Int64[np.ndarray, " block"]
    """Blocks to read, each into a stretch of `block_rows` rows."""
    rows: Int64[np.ndarray, " token"]
    """Rows of these stretches in the order of the stream."""


class Order:
    """The order of the stream, without the reading.

    Args:
        blocks: The hook's blocks.
        key: The key of the definition.
        lanes: Number of lanes; divides batch_tokens.
        batch_tokens: Rows in a global batch.
        window_tokens: Rows in the windows of all lanes.
    """

    def __init__(self, blocks: Blocks, key: int, *, lanes: int, batch_tokens: int, window_tokens: int) -> None:
        self.blocks = blocks
        self.lanes = lanes
        self.rows = int(blocks.kept.sum())
        """Rows that are kept: K."""
        self.lane_batch = batch_tokens // lanes
        """Rows of a lane in each batch: b."""
        self.batches_per_epoch = self.rows // lanes // self.lane_batch
        self._key = key
        self._lane_rows = self.rows // lanes
        self.window_rows = max(1, window_tokens // lanes)
        """Rows of a whole window: W."""
        self.window_batches = -(-(min(self.window_rows, max(1, self._lane_rows)) - 1) // self.lane_batch) + 1
        """Most batches that have rows of one window."""
        self._epoch = lru_cache(2)(self._make_epoch)  # around its end two epochs are in use

    def _make_epoch(self, epoch: int) -> tuple[Int64[np.ndarray, " block"], Int64[np.ndarray, " block_and_end"]]:
        """Return the epoch's blocks in order, and the number of the sequence's row that each begins with."""
        n = len(self.blocks.kept)
        order = Permutation(derive_key("blocks", self._key, epoch), n)(np.arange(n))
        return order, np.concatenate([[0], np.cumsum(self.blocks.kept[order])])

    def _shift(self, lane: int) -> int:
        return self.window_rows * lane // self.lanes

    def _span(self, lane: int, number: int) -> tuple[int, int]:
        start = number * self.window_rows - self._shift(lane)
        return max(0, start), min(self._lane_rows, start + self.window_rows)

    def window_index(self, lane: int, row: int) -> int:
        """Return which window of an epoch holds a row of a lane."""
        return (row + self._shift(lane)) // self.window_rows

    def window(self, place: Place) -> Window:
        """Work out a window: whole blocks to read and, of their rows, which come when."""
        epoch, lane, number = place
        start, stop = self._span(lane, number)
        order, starts = self._epoch(epoch)
        first, last = lane * self._lane_rows + start, lane * self._lane_rows + stop
        at = int(np.searchsorted(starts, first, "right")) - 1
        blocks = order[at : np.searchsorted(starts, last, "left")]
        blocks = blocks[self.blocks.kept[blocks] > 0]
        kept = np.flatnonzero(np.unpackbits(self.blocks.bits[blocks], axis=1, count=self.blocks.block_rows))
        kept = kept[first - starts[at] : last - starts[at]]
        shuffle = Permutation(derive_key("rows", self._key, *place), len(kept))
        return Window(place, start, stop, blocks, kept[shuffle(np.arange(len(kept)))])

    def batches_of(self, place: Place) -> range:
        """Return the batches that have rows of a window."""
        start, stop = self._span(place.lane, place.number)
        before = place.epoch * self.batches_per_epoch
        return range(
            before + start // self.lane_batch, before + min(-(-stop // self.lane_batch), self.batches_per_epoch)
        )

    def windows_from(self, batch: int, lanes: range) -> Iterator[Place]:
        """Name the windows of some lanes without end, as the batches from `batch` on come to need them."""
        epoch, index = divmod(batch, self.batches_per_epoch)
        row = index * self.lane_batch
        needed = [(batch, Place(epoch, lane, self.window_index(lane, row))) for lane in lanes]  # sorted, so a heap
        used = self.batches_per_epoch * self.lane_batch
        while True:
            _, (epoch, lane, number) = needed[0]
            yield needed[0][1]
            _, stop = self._span(lane, number)
            if stop < used:
                batch, place = epoch * self.batches_per_epoch + stop // self.lane_batch, Place(epoch, lane, number + 1)
            else:
                batch, place = (epoch + 1) * self.batches_per_epoch, Place(epoch + 1, lane, 0)
            heapq.heapreplace(needed, (batch, place))

    def rows_of(self, batch: int) -> Int64[np.ndarray, " token"]:
        """Return the numbers, in natural order, of the rows of a global batch."""
        epoch, index = divmod(batch, self.batches_per_epoch)
        begin, end = index * self.lane_batch, (index + 1) * self.lane_batch
        parts = []
        for lane in range(self.lanes):
            for at in range(self.window_index(lane, begin), self.window_index(lane, end - 1) + 1):
                window = self.window(Place(epoch, lane, at))
                rows = window.rows[max(begin, window.start) - window.start : end - window.start]
                slot, row = np.divmod(rows, self.blocks.block_rows)
                parts.append(self.blocks.first_row[window.blocks[slot]] + row)
        return np.concatenate(parts)


def choose_lanes(config: StreamConfig) -> int:
    """Return the number of lanes; 24 can be split among 1, 2, 3, 4, 6, 8, 12 and 24 ranks."""
    if config.lanes is not None:
        return config.lanes
    return math.gcd(config.batch_tokens, 64) if config.batch_tokens % 24 else 24
