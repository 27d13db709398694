"""The rows of the batches to come, of one hook: blocks are read, and each row is put into the batch that it is for."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from saepipe.shard import DTYPES
from saepipe.store import Store

_AHEAD = 24
"""Blocks that the disk is told of before they are read, since it would stand still while a block is hashed. Cold
epochs on a virtual disk: 10.6 s told just before the read, 10.7 s with 8, 7.8 s with 24 (medians of 3 noisy rounds)."""
_DECODED = 64
"""int8 rows that are decoded at once, so that what stands between stays in a core's cache."""


class BatchRows:
    """Slots of a batch's rows each, as they lie on disk; int8 stays int8 until a batch is complete.

    Args:
        store: The store.
        hook: Which of its hooks.
        slots: How many batches there is memory for.
        rows: Rows of each.
    """

    def __init__(self, store: Store, hook: str, *, slots: int, rows: int) -> None:
        self._store, self._hook, self._slot_rows = store, hook, rows
        self._size, width = store.plan.block_rows[hook], store.width(hook)
        # The last row is where those go that are for no batch.
        self._values = torch.empty(slots * rows + 1, width, dtype=DTYPES[store.plan.dtype])
        self._items = _items(self._values)
        self._scaled = store.plan.dtype == "int8"
        if self._scaled:
            self._row_scale = torch.empty(slots * rows + 1)
            self._shard = torch.empty(slots * rows + 1, dtype=torch.int64)
            self._scale, self._centre = torch.empty(2, store.plan.n_shards, width)

    def fill(
        self,
        blocks: Sequence[tuple[int, int]],
        goals: Int64[np.ndarray, "block row"],
        *,
        between: Callable[[], None],
    ) -> None:
        """Read blocks, verify them, and put their rows into their slots, in any thread.

        Args:
            blocks: Shard of each, and its number there among blocks of as many rows as `goals` has columns.
            goals: Where their rows go, counted through all slots; -1 for nowhere. What a block at the end of a shard
                lacks in rows is passed over.
            between: Called before each block; what it raises ends the reading.

        Raises:
            UserError: A block is missing or damaged.
        """
        room = torch.empty(self._size, *self._values.shape[1:], dtype=self._values.dtype)
        row_scale = torch.empty(self._size) if self._scaled else None
        items, pieces = _items(room), [*self._pieces(blocks, goals)]
        for piece in pieces[:_AHEAD]:
            self._store.announce(self._hook, piece.shard, piece.block)
        for at, piece in enumerate(pieces):
            between()
            for coming in pieces[at + _AHEAD : at + _AHEAD + 1]:
                self._store.announce(self._hook, coming.shard, coming.block)
            count = self._store.read_block_into(self._hook, piece.shard, piece.block, room, row_scale)
            # As NumPy's items, while they are in the core's cache: torch would take the training step's threads.
            self._items[piece.goals[:count]] = items[:count]
            if row_scale is not None:
                goal, scales = torch.from_numpy(piece.goals[:count]), self._store.scales(self._hook, piece.shard)
                self._row_scale[goal], self._shard[goal] = row_scale[:count], piece.shard
                self._scale[piece.shard], self._centre[piece.shard] = scales.scale, scales.centre

    def _pieces(self, blocks: Sequence[tuple[int, int]], goals: Int64[np.ndarray, "block row"]) -> Iterator["_Piece"]:
        """Name the hook's own blocks: those of a pair's other hook may be longer."""
        each = goals.shape[1] // self._size
        for (shard, number), block_goals in zip(blocks, goals, strict=True):
            for part in range(min(each, self._store.plan.n_blocks(self._hook, shard) - number * each)):
                yield _Piece(shard, number * each + part, block_goals[part * self._size : (part + 1) * self._size])

    def lend(self, slot: int, lease: object) -> Shaped[Tensor, "token d"]:
        """Return the rows of a slot as they are; their storage keeps `lease` alive."""
        lent = self._values[self._slot(slot)].view(torch.uint8).numpy().view(_Lent)
        lent.lease = lease
        return torch.from_numpy(lent).view(self._values.dtype)

    def copy(self, slot: int, *, pin: bool) -> Float[Tensor, "token d"]:
        """Return the rows of a slot in memory of their own, decoded."""
        rows = self._slot(slot)
        values = self._values[rows]
        out = torch.empty(values.shape, dtype=row_dtype(self._store), pin_memory=pin)
        if self._scaled:
            self._decode(rows, out)
        else:
            out.view(torch.uint8).numpy()[:] = values.view(torch.uint8).numpy()
        return out

    def _decode(self, rows: slice, out: Float[Tensor, "token d"]) -> None:
        for start in range(0, len(out), _DECODED):
            part = slice(rows.start + start, min(rows.start + start + _DECODED, rows.stop))
            shard, chunk = self._shard[part], out[start : start + _DECODED]
            chunk.copy_(self._values[part]).mul_(self._row_scale[part, None])
            chunk.mul_(self._scale.index_select(0, shard)).add_(self._centre.index_select(0, shard))

    def _slot(self, slot: int) -> slice:
        return slice(slot * self._slot_rows, (slot + 1) * self._slot_rows)


class _Piece(NamedTuple):
    """A block of the hook to read."""

    shard: int
    block: int
    goals: Int64[np.ndarray, " token"]


class _Lent(np.ndarray):
    """An array that keeps something alive."""

    lease: object


def row_dtype(store: Store) -> torch.dtype:
    """Return the type of the rows of a batch: the store's, or float32 where that is int8."""
    return torch.float32 if store.plan.dtype == "int8" else DTYPES[store.plan.dtype]


def _items(rows: Shaped[Tensor, "token d"]) -> Shaped[np.ndarray, " token"]:
    """View each row as one value, whatever it is made of."""
    return rows.view(torch.uint8).numpy().view((np.void, rows.shape[1] * rows.itemsize))[:, 0]
