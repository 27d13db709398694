"""Batches of activations from a store's shards, read and shuffled in memory in the order that `saepipe.order` defines.

A window's blocks are read straight into its buffer and verified there; a batch gathers rows from the buffers of the
rank's lanes. Memory: one window for each lane, one more that is read ahead, and the batches that are ready.
"""

import atexit
import logging
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from weakref import WeakSet

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from saepipe.config import StreamConfig
from saepipe.errors import UserError, unknown
from saepipe.order import Blocks, Order, Place, Window, choose_lanes
from saepipe.permutation import derive_key
from saepipe.row_filter import RowFilter
from saepipe.store import Store
from saepipe.window_rows import WindowRows, row_dtype, words

log = logging.getLogger(__name__)

Batch = Float[Tensor, "token d_in"] | tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]
"""Rows of the hook; with `stream.target_hook` also the same tokens' rows of that one."""

_AHEAD = 24
"""Blocks that the disk is told of before they are read, since it would stand still while a block is hashed. Cold
epochs on a virtual disk: 10.6 s told just before the read, 10.7 s with 8, 7.8 s with 24 (medians of 3 noisy rounds)."""

_open: "WeakSet[Generator[Batch, None, None]]" = WeakSet()


@atexit.register
def _close_all() -> None:
    """Close the iterators that are still open, before the interpreter takes down the modules that closing needs."""
    for batches in list(_open):
        batches.close()


@dataclass(frozen=True)
class _Loaded:
    """A window in memory."""

    window: Window
    buffers: list[WindowRows]
    """One for each hook."""


class Stream:
    """Batches of a store's activations, in the order that `saepipe.order` defines.

    Args:
        store: A complete store.
        config: Batch, window, lanes, seed, hooks and filter.
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
        """Where the rows come from."""
        self.target_hook = choose_target(store, config, self.hook)
        """Where the rows to predict come from; None: they are the same."""
        self._hooks = [self.hook] if self.target_hook is None else [self.hook, self.target_hook]
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
        self._dtype = row_dtype(store)
        self._pin = torch.cuda.is_available()
        row_filter = RowFilter.of(config, exclude_special_tokens=exclude_special_tokens)
        parts = (config.seed, config.batch_tokens, config.window_tokens, self.lanes)
        self._order = Order(
            Blocks.of(
                store.plan, self._hooks, partial(row_filter.mask, store, self._hooks) if row_filter.text else None
            ),
            derive_key("stream", store.plan.identity, self.hook, self.target_hook or "", *parts, row_filter.text),
            lanes=self.lanes,
            batch_tokens=config.batch_tokens,
            window_tokens=config.window_tokens,
        )
        if not self._order.batches_per_epoch:
            raise _too_small(self._order.rows, config, row_filter.text)
        if rank == 0:
            log.info(
                "%s: %s rows%s, %s batches an epoch; %s of %s rows are left out of each, other ones every time",
                store.folder,
                f"{store.rows:,}",
                f", of which the filter ({row_filter.text.replace(';', ', ')}) keeps {self._order.rows:,}"
                if row_filter.text
                else "",
                f"{self.batches_per_epoch:,}",
                f"{self._order.rows - self.batches_per_epoch * config.batch_tokens:,}",
                f"{self._order.rows:,}",
            )

    @property
    def d_in(self) -> int:
        """Width of the rows."""
        return self._store.width(self.hook)

    @property
    def d_out(self) -> int:
        """Width of the rows to predict."""
        return self._store.width(self.target_hook or self.hook)

    @property
    def batches_per_epoch(self) -> int:
        """Batches in one pass over the store."""
        return self._order.batches_per_epoch

    def rows_of(self, batch: int) -> Int64[np.ndarray, " token"]:
        """Return the numbers, in natural order, of the rows of a global batch, in the batch's order."""
        return self._order.rows_of(batch)

    def iterate(self, start: int = 0) -> Generator[Batch, None, None]:
        """Read this rank's part of batch `start` and of all that follow, epoch after epoch, without end.

        The batches are of the store's type (float32 where that is int8), and pinned where there is a GPU. Closing or
        dropping the iterator ends its threads.

        Raises:
            UserError: A shard is missing or damaged; its rows reach no batch.
        """
        batches = self._prefetched(start) if self._prefetch_batches else self._batches(start, partial)
        _open.add(batches)
        return batches

    def _prefetched(self, start: int) -> Generator[Batch, None, None]:
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

    def _batches(self, start: int, begin: Callable[..., Callable[[], _Loaded]]) -> Generator[Batch, None, None]:
        """Gather the batches; `begin(load, ...)` starts to read a window and returns what waits for it."""
        order, lanes = self._order, self._rank_lanes
        places = order.windows_from(start, lanes)
        loaded: dict[int, _Loaded] = {}
        coming = begin(self._load, next(places), None)
        for batch in range(start, 2**63):
            epoch, index = divmod(batch, order.batches_per_epoch)
            parts = [self._empty(hook) for hook in self._hooks]
            views = [words(part) for part in parts]
            begin_row, filled = index * order.lane_batch, 0
            for lane in lanes:
                row, end = begin_row, begin_row + order.lane_batch
                while row < end:
                    now = loaded.get(lane)
                    if now is None or not now.window.holds(epoch, row):
                        loaded[lane] = coming()
                        coming = begin(self._load, next(places), now.buffers if now else None)
                        now = loaded[lane]
                        assert now.window.place == Place(epoch, lane, order.window_index(lane, row))
                    rows = now.window.rows[row - now.window.start : end - now.window.start]
                    for buffer, view in zip(now.buffers, views, strict=True):
                        buffer.take(rows, view[filled : filled + len(rows)])
                    filled, row = filled + len(rows), row + len(rows)
            yield parts[0] if len(parts) == 1 else (parts[0], parts[1])

    def _load(self, place: Place, buffers: list[WindowRows] | None) -> _Loaded:
        """Read a window's blocks into buffers, or into new ones where none are given or they are too small."""
        window = self._order.window(place)
        blocks = self._order.blocks
        if buffers is None or buffers[0].blocks < len(window.blocks):
            # Room for any later window: a buffer that grows stands beside the new one for a while.
            most = max(len(window.blocks), self._order.window_blocks)
            buffers = [WindowRows(self._store, hook, block_rows=blocks.block_rows, blocks=most) for hook in self._hooks]
        places = [*zip(blocks.shard[window.blocks].tolist(), blocks.number[window.blocks].tolist(), strict=True)]
        for buffer in buffers:
            for place_ahead in places[:_AHEAD]:
                buffer.announce(*place_ahead)
            for slot, at in enumerate(places):
                for place_ahead in places[slot + _AHEAD : slot + _AHEAD + 1]:
                    buffer.announce(*place_ahead)
                buffer.read(slot, *at)
        return _Loaded(window, buffers)

    def _empty(self, hook: str) -> Tensor:
        rows = self._order.lane_batch * len(self._rank_lanes)
        return torch.empty(rows, self._store.width(hook), dtype=self._dtype, pin_memory=self._pin)


def choose_hook(store: Store, config: StreamConfig) -> str:
    """Return the hook to train on."""
    if config.hook is not None:
        store.width(config.hook)  # refuses a hook that is not there
        return config.hook
    if len(store.hooks) > 1:
        raise UserError(
            f"stream.hook=null is not clear, since the store has several; give one of {', '.join(store.hooks)}"
        )
    return store.hooks[0]


def choose_target(store: Store, config: StreamConfig, hook: str) -> str | None:
    """Return the hook to predict from `hook`; None where it is the same."""
    if config.target_hook in (None, hook):
        return None
    if config.target_hook not in store.hooks:
        there = f"Those are the hooks of store.dir={store.folder}."
        raise unknown("stream.target_hook", config.target_hook, store.hooks, there)
    return config.target_hook


def _too_small(rows: int, config: StreamConfig, filtered: str) -> UserError:
    """Build the error for a store of less than a batch; any batch up to its rows that the lanes divide would do."""
    filtered = filtered.replace(";", ", ")
    if filtered and not rows:
        return UserError(
            f"the filter of the stream ({filtered}) keeps no row of the store; widen stream.positions, "
            "stream.max_norm or stream.roles"
        )
    largest = rows // config.lanes * config.lanes if config.lanes else rows
    cure = f"the largest batch is {largest}, or cache more store.tokens" if largest else "cache more store.tokens"
    left = f"that the filter keeps ({filtered})" if filtered else "in the store"
    return UserError(f"stream.batch_tokens={config.batch_tokens} is more than the {rows} rows {left}; {cure}")
