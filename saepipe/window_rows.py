"""The rows of one hook in a window, in memory as they lie on disk: verified blocks go in, rows come out."""

import torch
from jaxtyping import Float, Int64, Shaped
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
        # Gathering moves element by element, bfloat16 at half the speed: so rows are made of the widest integers.
        words = (torch.int64, torch.int32, torch.int16, torch.int8)
        self._word = next(word for word in words if width * dtype.itemsize % word.itemsize == 0)
        per_row = width * dtype.itemsize // self._word.itemsize
        self._words = torch.empty(blocks * block_rows, per_row, dtype=self._word)
        self._values = self._words.view(dtype)
        self._scaled = dtype == torch.int8
        if self._scaled:
            self._row_scale = torch.empty(blocks * block_rows)
            self._centre, self._scale = torch.empty(blocks, width), torch.empty(blocks, width)

    def read(self, slot: int, shard: int, number: int) -> None:
        """Read a block of a shard into a slot, from any thread.

        Raises:
            UserError: The block is missing or damaged.
        """
        plan = self._store.plan
        size = plan.block_rows[self._hook]
        first, at = number * self._block_rows // size, slot * self._block_rows
        stop = min(first + self._block_rows // size, plan.n_blocks(self._hook, shard))
        for block in range(first, stop):
            part = slice(at + (block - first) * size, at + (block - first + 1) * size)
            row_scale = self._row_scale[part] if self._scaled else None
            self._store.read_block_into(self._hook, shard, block, self._values[part], row_scale)
        if self._scaled:
            scales = self._store.scales(self._hook, shard)
            self._centre[slot], self._scale[slot] = scales.centre, scales.scale

    def take(self, rows: Int64[Tensor, " token"], out: Float[Tensor, "token d_in"]) -> None:
        """Copy rows, by their numbers among all slots, to `out` (see `row_dtype`)."""
        if not self._scaled:
            torch.index_select(self._words, 0, rows, out=out.view(self._word))
            return
        slots = rows // self._block_rows
        out.copy_(self._gathered(rows)).mul_(self._row_scale[rows, None])
        out.mul_(self._scale.index_select(0, slots)).add_(self._centre.index_select(0, slots))

    def _gathered(self, rows: Int64[Tensor, " token"]) -> Shaped[Tensor, "token d_in"]:
        return self._words.index_select(0, rows).view(torch.int8)


def row_dtype(store: Store) -> torch.dtype:
    """Return the type of the rows that `take` gives: the store's, or float32 where that is int8."""
    return torch.float32 if store.plan.dtype == "int8" else DTYPES[store.plan.dtype]
