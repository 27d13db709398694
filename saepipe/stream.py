"""Batches of activations from a store's shards, read and shuffled in memory in the order that `saepipe.order` defines.

A window's blocks are read straight into its buffer and verified there; a batch gathers rows from the buffers of the
rank's lanes. Memory: one window for each lane, one more that is read ahead, and the batches that are ready.
"""

import atexit
import logging
import math
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from saepipe.config import StreamConfig
from saepipe.errors import UserError
from saepipe.order import Blocks, Order, Place, Window
from saepipe.permutation import derive_key
from saepipe.shards import DTYPES
from saepipe.store import Store

log = logging.getLogger(__name__)

_open: "WeakSet[Generator[Tensor, None, None]]" = WeakSet()


@atexit.register
def _close_all() -> None:
    """Close the iterators that are still open, before the interpreter takes down the modules that closing needs."""
    for batches in list(_open):
        batches.close()


@dataclass(frozen=True)
class _Loaded:
    """A window in memory."""

    window: Window
    rows: Int64[Tensor, " token"]
    buffer: Int[Tensor, "row word"]


class Stream:
    """Batches of a store's activations, in the order that `saepipe.order` defines.

    Args:
        store: A complete store.
        config: Batch, window, lanes, seed and hook.
        exclude_special_tokens: Leave special tokens and position 0 out.
        rank: Number of this process among those that share the global batch.
        world_size: How many there are.

    Raises:
        UserError: The hook is not in the store or not the only one, the store is too small for a batch, or the lanes
            cannot be split among the ranks.
    """

    def __init__(
        self, store: Store, config: StreamConfig, *, exclude_special_tokens: bool, rank: int = 0, world_size: int = 1
    ) -> None:
        self.hook = choose_hook(store, config)
        self.d_in = store.width(self.hook)
        self.lanes = choose_lanes(config)
        if self.lanes % world_size:
            valid = [str(ranks) for ranks in range(1, self.lanes + 1) if self.lanes % ranks == 0]
            raise UserError(
                f"stream.lanes={self.lanes} cannot be split among {world_size} ranks; run {' or '.join(valid)} ranks, "
                f"or set stream.lanes to a multiple of {world_size} that divides batch_tokens={config.batch_tokens}"
            )
        assert 0 <= rank < world_size
        self._store = store
        self._rank_lanes = range(rank, self.lanes, world_size)
        self._prefetch_batches = config.prefetch_batches
        self._dtype = DTYPES[store.plan.dtype]
        self._word = _word(self.d_in * self._dtype.itemsize)
        self._pin = torch.cuda.is_available()
        parts = (self.hook, config.seed, config.batch_tokens, config.window_tokens, self.lanes)
        self._order = Order(
            Blocks.of(store, self.hook, exclude_special_tokens=exclude_special_tokens),
            derive_key("stream", store.plan.identity, *parts, int(exclude_special_tokens)),
            lanes=self.lanes,
            batch_tokens=config.batch_tokens,
            window_tokens=config.window_tokens,
        )
        if not self._order.batches_per_epoch:
            raise _too_small(self._order.rows, config, filtered=exclude_special_tokens)
        if rank == 0:
            log.info(
                "%s: %s batches an epoch; %s of %s rows are left out of each, other ones every time",
                store.folder,
                f"{self.batches_per_epoch:,}",
                f"{self._order.rows - self.batches_per_epoch * config.batch_tokens:,}",
                f"{self._order.rows:,}",
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one pass over the store."""
        return self._order.batches_per_epoch

    def rows_of(self, batch: int) -> Int64[np.ndarray, " token"]:
        """Return the numbers, in natural order, of the rows of a global batch, in the batch's order."""
        return self._order.rows_of(batch)

    def iterate(self, start: int = 0) -> Generator[Float[Tensor, "token d_in"], None, None]:
        """Read this rank's part of batch `start` and of all that follow, epoch after epoch, without end.

        The batches are of the store's type, and pinned where there is a GPU. Closing or dropping the iterator ends its
        threads.

        Raises:
            UserError: A shard is missing or damaged; its rows reach no batch.
        """
        batches = self._prefetched(start) if self._prefetch_batches else self._batches(start, partial)
        _open.add(batches)
        return batches

    def _prefetched(self, start: int) -> Generator[Tensor, None, None]:
        """Gather the batches in a thread, ahead of the consumer."""
        # Two threads, so that gathering rows and reading the next window go on at once. A task is one batch or one
        # window and ends by itself, so neither closing nor the interpreter's exit can wait for long.
        with ThreadPoolExecutor(1, "batches") as gather, ThreadPoolExecutor(1, "windows") as read:
            batches = self._batches(start, lambda load, *what: read.submit(load, *what).result)
            ready = deque(gather.submit(next, batches) for _ in range(self._prefetch_batches))
            try:
                while True:
                    batch = ready.popleft().result()
                    ready.append(gather.submit(next, batches))
                    yield batch
            finally:
                for future in ready:
                    future.cancel()

    def _batches(self, start: int, begin: Callable[..., Callable[[], _Loaded]]) -> Generator[Tensor, None, None]:
        """Gather the batches; `begin(load, ...)` starts to read a window and returns what waits for it."""
        order, lanes = self._order, self._rank_lanes
        places = order.windows_from(start, lanes)
        loaded: dict[int, _Loaded] = {}
        coming = begin(self._load, next(places), None)
        for batch in range(start, 2**63):
            epoch, index = divmod(batch, order.batches_per_epoch)
            tokens = self._empty_batch()
            target = tokens.view(self._word)
            filled = 0
            for lane in lanes:
                row, end = index * order.lane_batch, (index + 1) * order.lane_batch
                while row < end:
                    place = Place(epoch, lane, order.window_index(lane, row))
                    if lane not in loaded or loaded[lane].window.place != place:
                        spare = loaded.pop(lane).buffer if lane in loaded else None
                        loaded[lane] = coming()
                        assert loaded[lane].window.place == place
                        coming = begin(self._load, next(places), spare)
                    now = loaded[lane]
                    first, last = row - now.window.start, min(end, now.window.stop) - now.window.start
                    n = last - first
                    torch.index_select(now.buffer, 0, now.rows[first:last], out=target[filled : filled + n])
                    filled, row = filled + n, row + n
            yield tokens

    def _load(self, place: Place, buffer: Tensor | None) -> _Loaded:
        """Read a window's blocks into a buffer, or into a new one where none is given or it is too small."""
        window = self._order.window(place)
        blocks, size = self._order.blocks, self._order.blocks.block_rows
        if buffer is None or len(buffer) < len(window.blocks) * size:
            # Room for any later window: a buffer that grows stands beside the new one for a while.
            most = max(len(window.blocks), self._order.window_blocks)
            words = self.d_in * self._dtype.itemsize // self._word.itemsize
            buffer = torch.empty(most * size, words, dtype=self._word)
        rows = buffer.view(self._dtype)
        for slot, block in enumerate(window.blocks.tolist()):
            out = rows[slot * size : (slot + 1) * size]
            self._store.read_block_into(self.hook, int(blocks.shard[block]), int(blocks.number[block]), out)
        return _Loaded(window, torch.from_numpy(window.rows), buffer)

    def _empty_batch(self) -> Tensor:
        rows = self._order.lane_batch * len(self._rank_lanes)
        return torch.empty(rows, self.d_in, dtype=self._dtype, pin_memory=self._pin)


def _word(row_bytes: int) -> torch.dtype:
    """Pick the widest integer that fills a row: gathering moves element by element, bfloat16 at half the speed."""
    return next(word for word in (torch.int64, torch.int32, torch.int16) if row_bytes % word.itemsize == 0)


def choose_hook(store: Store, config: StreamConfig) -> str:
    """Return the hook to train on."""
    if config.hook is not None:
        return config.hook
    if len(store.hooks) > 1:
        raise UserError(
            f"stream.hook=null is not clear, since the store has several; give one of {', '.join(store.hooks)}"
        )
    return store.hooks[0]


def choose_lanes(config: StreamConfig) -> int:
    """Return the number of lanes; 24 can be split among 1, 2, 3, 4, 6, 8, 12 and 24 ranks."""
    if config.lanes is not None:
        return config.lanes
    return math.gcd(config.batch_tokens, 64) if config.batch_tokens % 24 else 24


def _too_small(rows: int, config: StreamConfig, *, filtered: bool) -> UserError:
    """Build the error for a store of less than a batch; any batch up to its rows that the lanes divide would do."""
    largest = rows // config.lanes * config.lanes if config.lanes else rows
    cure = f"the largest batch is {largest}, or cache more store.tokens" if largest else "cache more store.tokens"
    left = "once special tokens and position 0 are left out" if filtered else "in the store"
    return UserError(f"stream.batch_tokens={config.batch_tokens} is more than the {rows} rows {left}; {cure}")
