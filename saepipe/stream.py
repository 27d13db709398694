"""Batches of activations from a store's shards, read and shuffled in memory in the order that `saepipe.order` defines.

Memory: the window, a lane's part of it for each thread that reads ahead, and the batches that are ready.
"""

import logging
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int64
from torch import Tensor

from saepipe import parallel
from saepipe.background import Background, StoppedError
from saepipe.config import StreamConfig
from saepipe.errors import UserError, unknown
from saepipe.order import Blocks, Order, choose_lanes
from saepipe.permutation import derive_key
from saepipe.row_filter import RowFilter
from saepipe.store import Store
from saepipe.windows import Windows

log = logging.getLogger(__name__)

Batch = Float[Tensor, "token d_in"] | tuple[Float[Tensor, "token d_in"], Float[Tensor, "token d_out"]]
"""Rows of the hook; with `stream.target_hook` also the same tokens' rows of that one."""

_MOST_READERS = 4
"""Threads that read windows; they share Python's lock, so that more of them soon wait for each other."""
_LANES_PER_READER = 12
"""Each reader has a lane's part of the window read ahead, so that few lanes with many readers would double memory."""


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
        self.lanes = check_ranks(config, world_size)
        assert 0 <= rank < world_size
        self._store = store
        self._rank_lanes = range(rank, self.lanes, world_size)
        self._prefetch_batches = config.prefetch_batches
        readers = min(_MOST_READERS, parallel.threads(), max(1, len(self._rank_lanes) // _LANES_PER_READER))
        self._readers = readers if config.prefetch_batches else 0
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
            left = self._order.rows - self.batches_per_epoch * config.batch_tokens
            log.info(
                "%s: %s rows%s, %s batches an epoch%s",
                store.folder,
                f"{store.rows:,}",
                f", of which the filter ({row_filter.text.replace(';', ', ')}) keeps {self._order.rows:,}"
                if row_filter.text
                else "",
                f"{self.batches_per_epoch:,}",
                f"; {left:,} rows fill no batch of an epoch, other ones in every epoch" if left else "",
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

    def iterate(self, start: int = 0) -> "Batches":
        """Read this rank's part of batch `start` and of all that follow, epoch after epoch, without end.

        The batches are of the store's type (float32 where that is int8), and pinned where there is a GPU. They are the
        caller's to keep and to write to; one that is kept for long should be cloned, since it may keep the memory of
        the whole window. Closing the iterator ends its threads, and dropping it does so in a moment.

        Raises:
            UserError: A shard is missing or damaged; its rows reach no batch.
        """
        readers, maker = Background(self._readers, "windows"), Background(int(bool(self._prefetch_batches)), "batches")
        return Batches(self._prefetched(self._batches(start, readers), maker), maker, readers)

    def _prefetched(self, batches: Iterator[Batch], maker: Background) -> Iterator[Batch]:
        """Make the batches ahead of the consumer, out of the windows that the readers read."""
        ready = deque(maker.begin(partial(next, batches)) for _ in range(self._prefetch_batches))
        while True:
            ready.append(maker.begin(partial(next, batches)))
            yield ready.popleft()()

    def _batches(self, start: int, readers: Background) -> Iterator[Batch]:
        windows = Windows(
            self._store,
            self._hooks,
            self._order,
            self._rank_lanes,
            ahead=self._readers,
            in_use=self._prefetch_batches + 2,  # those that are ready, and the consumer's old and new one
        )
        for rows in windows.batches(start, readers):
            yield rows[0] if len(rows) == 1 else (rows[0], rows[1])


class Batches(Iterator[Batch]):
    """The batches of one `Stream.iterate`."""

    def __init__(self, batches: Iterator[Batch], maker: Background, readers: Background) -> None:
        self._batches, self._threads = batches, (maker, readers)

    def __next__(self) -> Batch:
        """Return the next batch."""
        try:
            return next(self._batches)
        except StoppedError:  # closed, or the interpreter ends
            raise StopIteration from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads, after the block that each of them is at."""
        self.__del__()
        for threads in self._threads:
            threads.join()

    def __del__(self) -> None:
        """End the threads without waiting for them: the garbage collector may be at work in one of them."""
        for threads in self._threads:
            threads.stop()


@runtime_checkable
class HasHooks(Protocol):
    """A store, or what is known of one that is not made yet."""

    @property
    def folder(self) -> Path:
        """Where it is."""
        ...

    @property
    def hooks(self) -> list[str]:
        """The hooks that it holds rows of."""
        ...

    def width(self, hook: str) -> int:
        """Return the width of a hook's rows."""
        ...


def check_ranks(config: StreamConfig, world_size: int) -> int:
    """Return the number of lanes, which the ranks divide among themselves.

    Raises:
        UserError: They cannot; the message says which numbers can.
    """
    lanes, batch = choose_lanes(config), config.batch_tokens
    if lanes % world_size:
        valid = [str(ranks) for ranks in range(1, lanes + 1) if lanes % ranks == 0]
        raise UserError(
            f"stream.lanes={lanes} cannot be split among {world_size} ranks; run {' or '.join(valid)} "
            f"rank{'s' if valid[1:] else ''}, or set stream.lanes to a multiple of {world_size} that divides "
            f"stream.batch_tokens={batch}"
        )
    return lanes


def choose_hook(store: HasHooks, config: StreamConfig) -> str:
    """Return the hook to train on."""
    if config.hook is not None:
        store.width(config.hook)  # refuses a hook that is not there
        return config.hook
    if len(store.hooks) > 1:
        raise UserError(
            f"stream.hook=null is not clear, since the store has several; give one of {', '.join(store.hooks)}"
        )
    return store.hooks[0]


def choose_target(store: HasHooks, config: StreamConfig, hook: str) -> str | None:
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
