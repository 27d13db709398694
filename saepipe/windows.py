"""Windows on their way into batches: each is read whole, and its rows are put into the batches that they are for.

So no row is moved twice, and the memory of the shuffle is that of the batches which have rows of a window that was
begun: the rows of a window in all, and those of the windows that are read ahead and of the batches that are in use.
"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from saepipe.background import Background
from saepipe.batch_rows import BatchRows
from saepipe.order import Order, Place
from saepipe.store import Store


class Windows:
    """The windows of some lanes.

    Args:
        store: The store.
        hooks: The hook, or the pair of them.
        order: Order of the stream.
        lanes: The rank's lanes.
        ahead: How many windows to read before they are needed.
        in_use: How many batches the caller has at once; if it keeps more, they are copied.
    """

    def __init__(self, store: Store, hooks: list[str], order: Order, lanes: range, *, ahead: int, in_use: int) -> None:
        self._order, self._lanes, self._in_use = order, lanes, in_use
        self._pin = torch.cuda.is_available()
        self._copied = self._pin or store.plan.dtype == "int8"
        # The lanes come to their next windows one after the other, that many batches apart.
        apart = -(-order.window_batches // len(lanes))
        self._most_coming = order.window_batches + apart * ahead
        self._batch_rows = order.lane_batch * len(lanes)
        self._slots = self._most_coming + in_use
        self._rows = [BatchRows(store, hook, slots=self._slots, rows=self._batch_rows) for hook in hooks]
        self._free = deque(range(self._slots))
        self._coming: dict[int, int] = {}
        """Slots of the batches that have rows of a window that was begun: the next ones, without a gap."""

    def batches(self, start: int, readers: Background) -> Iterator[list[Tensor]]:
        """Make the lanes' part of batch `start` and of all that follow: rows of each hook.

        Args:
            start: Number of the first batch.
            readers: Threads to read windows in.

        Raises:
            UserError: A shard is missing or damaged.
        """
        begun = deque[tuple[int, Callable[[], None]]]()
        places = self._order.windows_from(start, self._lanes)
        place = next(places)
        for batch in count(start):
            while (having := self._order.batches_of(place)).stop <= batch + self._most_coming:
                for number in range(batch + len(self._coming), having.stop):
                    self._coming[number] = self._free.pop()
                begun.append((having.start, readers.begin(self._reading(place, readers))))
                place = next(places)
            while begun and begun[0][0] <= batch:
                begun.popleft()[1]()
            yield self._hand_out(self._coming.pop(batch))

    def _reading(self, place: Place, readers: Background) -> Callable[[], None]:
        """Return the work of reading a window; its batches have slots by now."""
        # Rows may be for no batch: for one before the first, or left out of the epoch, which the last entry is for.
        slots = np.array([*(self._coming.get(number, -1) for number in self._order.batches_of(place)), -1])
        return partial(self._read, place, slots, readers.check)

    def _read(self, place: Place, slots: Int64[np.ndarray, " batch"], between: Callable[[], None]) -> None:
        window, blocks = self._order.window(place), self._order.blocks
        batch, row = np.divmod(np.arange(window.start, window.stop), self._order.lane_batch)
        slot = slots[np.minimum(batch - batch[0], len(slots) - 1)]
        row += slot * self._batch_rows + self._lanes.index(place.lane) * self._order.lane_batch
        goals = np.full((len(window.blocks), blocks.block_rows), -1)
        goals.reshape(-1)[window.rows] = np.where(slot < 0, -1, row)
        where = [*zip(blocks.shard[window.blocks].tolist(), blocks.number[window.blocks].tolist(), strict=True)]
        for rows in self._rows:
            rows.fill(where, goals, between=between)

    def _hand_out(self, slot: int) -> list[Tensor]:
        """Return the rows of a slot, which is free again once they are copied or nobody has them any more."""
        lent = self._slots - len(self._free) - len(self._coming) - 1
        if self._copied or lent >= self._in_use:
            copies = [rows.copy(slot, pin=self._pin) for rows in self._rows]
            self._free.append(slot)
            return copies
        lease = _Lease()
        weakref.finalize(lease, self._free.append, slot).atexit = False
        return [rows.lend(slot, lease) for rows in self._rows]


class _Lease:
    """A slot is lent for as long as this lives."""
