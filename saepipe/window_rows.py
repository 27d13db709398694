"""The rows of one hook in a window, in memory as they lie on disk: verified blocks go in, rows come out."""

import numpy as np
import torch
from jaxtyping import Float, Int8, Int64, Shaped
from torch import Tensor

from saepipe.shard import DTYPES
from saepipe.store import Store


class WindowRows:
    """Room for blocks of a hook; int8 stays int8 until a row is taken.

    Args:
        store: The store.
        hook: Which of its hooks.
        block_rows: Rows of a block of the stream: the hook's own, or a multiple where another hook has longer ones.
        blocks: How many of them there is room for.
    """

    def __init__(self, store: Store, hook: str, *, block_rows: int, blocks: int) -> None:
        dtype, width = DTYPES[store.plan.dtype], store.width(hook)
        self._store, self._hook, self._block_rows = store, hook, block_rows
        self.blocks = blocks
        self._values = torch.empty(blocks * block_rows, width, dtype=dtype)
        self._words = words(self._values)
        self._scaled = dtype == torch.int8
        if self._scaled:
            self._row_scale = torch.empty(blocks * block_rows)
            self._centre, self._scale = torch.empty(blocks, width), torch.empty(blocks, width)

    def announce(self, shard: int, number: int) -> None:
        """Have the disk begin to read a block that will soon be asked for."""
        for block in self._blocks(shard, number):
            self._store.announce(self._hook, shard, block)

    def _blocks(self, shard: int, number: int) -> range:
        """Return the hook's own blocks in a block of the stream."""
        plan = self._store.plan
        size = plan.block_rows[self._hook]
        first = number * self._block_rows // size
        return range(first, min(first + self._block_rows // size, plan.n_blocks(self._hook, shard)))

    def read(self, slot: int, shard: int, number: int) -> None:
        """Read a block of a shard into a slot, from any thread.

        Raises:
            UserError: The block is missing or damaged.
        """
        size, at = self._store.plan.block_rows[self._hook], slot * self._block_rows
        for index, block in enumerate(self._blocks(shard, number)):
            part = slice(at + index * size, at + (index + 1) * size)
            row_scale = self._row_scale[part] if self._scaled else None
            self._store.read_block_into(self._hook, shard, block, self._values[part], row_scale)
        if self._scaled:
            scales = self._store.scales(self._hook, shard)
            self._centre[slot], self._scale[slot] = scales.centre, scales.scale

    def take(self, rows: Int64[np.ndarray, " token"], out: Shaped[np.ndarray, "token word"]) -> None:
        """Copy rows, by their numbers among all slots, to the `words` of rows of the `row_dtype`."""
        if not self._scaled:
            # NumPy's, on one thread: of the 64 rows that a lane gives to a batch, torch's takes two to four times as
            # long. It would have checked the numbers, and copied `out` for that.
            self._words.take(rows, axis=0, out=out, mode="clip")
            return
        slots, numbers = torch.from_numpy(rows // self._block_rows), torch.from_numpy(rows)
        values = torch.from_numpy(out).view(torch.float32)
        values.copy_(torch.from_numpy(self._words.take(rows, axis=0)).view(torch.int8))
        values.mul_(self._row_scale[numbers, None])
        values.mul_(self._scale.index_select(0, slots)).add_(self._centre.index_select(0, slots))


def words(rows: Float[Tensor, "token d"] | Int8[Tensor, "token d"]) -> Shaped[np.ndarray, "token word"]:
    """View rows as the widest integers that they can be made of: gathering moves one after the other."""
    size = rows.shape[1] * rows.dtype.itemsize
    kinds = (torch.int64, torch.int32, torch.int16, torch.int8)
    return rows.view(next(kind for kind in kinds if size % kind.itemsize == 0)).numpy()


def row_dtype(store: Store) -> torch.dtype:
    """Return the type of the rows that `take` gives: the store's, or float32 where that is int8."""
    return torch.float32 if store.plan.dtype == "int8" else DTYPES[store.plan.dtype]
