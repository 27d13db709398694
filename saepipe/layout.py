"""Where each row of a store lies: shuffle groups, shards, blocks, and the token that every row belongs to.

In full, for somebody who wants to find a row (divisions are whole; `Permutation`, its members and `derive_key` are
those of `saepipe.permutation`; c is context_size):

1. Groups. A group has n = shuffle_tokens // c contexts, rounded down to a multiple of the largest block where there are
   that many; the last group has what is left. Slot i of group g holds the training context
   Permutation(derive_key("contexts", token_store, seed), contexts)(g * n + i).
2. Rows. Row j of group g is in round r = j // n. It belongs to slot i = Permutation(key("slots"), n)(j % n) by member
   r, and to position Permutation(key("positions"), c)(r) by member i, where key(name) = derive_key(name, token_store,
   seed, g). The last group ends with the row that completes `tokens`.
3. Shards. The rows of a group, in order, fill its shards of shard_tokens rows. Blocks are whole fractions of a shard.

So every round holds one token of each of the group's contexts, and a block no longer than a round never two of one
context: blocks are what training shuffles, so no batch sees more of a context than chance would give it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Int64

from saepipe.config import STORE_DTYPES
from saepipe.permutation import Permutation, derive_key

HEADER_BYTES = 4096
"""Size of a shard's header: one page, so that blocks of whole pages stay aligned."""
_BLOCK_BYTES = 1 << 20
_BLOCKS = 4096
_LEAST_BLOCK_ROWS = 16


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The part of a plan that says where rows lie."""

    token_store: str
    """Hash of the token store."""
    contexts: int
    """Training contexts in the token store."""
    held_out_contexts: int
    """Held-out contexts whose activations are stored: the first ones of the token store."""
    context_size: int
    """Tokens per context."""
    hooks: dict[str, int]
    """Width of each hook point."""
    dtype: str
    """Type on disk."""
    tokens: int
    """Training rows per hook."""
    shard_tokens: int
    """Rows per shard; the last shard of a group may hold fewer."""
    shuffle_tokens: int
    """Most rows that are shuffled together."""
    block_rows: dict[str, int]
    """Rows per block (the unit of reading and hashing) of each hook: powers of two."""
    seed: int
    """Seed of the shuffle."""

    # ---- groups

    @cached_property
    def group_size(self) -> int:
        """Contexts in a whole shuffle group."""
        return group_size(self.shuffle_tokens, self.context_size, max(self.block_rows.values()))

    @property
    def n_groups(self) -> int:
        """Number of shuffle groups."""
        return math.ceil(math.ceil(self.tokens / self.context_size) / self.group_size)

    def group_rows(self, group: int) -> int:
        """Return how many rows a group has; the last one may be smaller."""
        whole = self.group_size * self.context_size
        return min(whole, self.tokens - group * whole)

    def group_shards(self, group: int) -> range:
        """Return the numbers of a group's shards."""
        first = group * self._shards_per_group
        return range(first, first + math.ceil(self.group_rows(group) / self.shard_tokens))

    def group_contexts(self, group: int) -> Int64[np.ndarray, " context"]:
        """Return the training contexts of a group, slot after slot: the order in which the model reads them."""
        first = group * self.group_size
        order = Permutation(derive_key("contexts", self.token_store, self.seed), self.contexts)
        return order(np.arange(first, first + self._slots(group)))

    def group_targets(self, group: int) -> Int64[np.ndarray, "context seq"]:
        """Return where in its group each token of `group_contexts` is stored; -1 where it is not (last group only)."""
        targets = np.full((self._slots(group), self.context_size), -1)
        rows = np.arange(self.group_rows(group))
        targets[self._sources(group, rows)] = rows
        return targets

    @property
    def _shards_per_group(self) -> int:
        return math.ceil(self.group_size * self.context_size / self.shard_tokens)

    def _slots(self, group: int) -> int:
        return math.ceil(self.group_rows(group) / self.context_size)

    def _sources(
        self, group: int, rows: Int64[np.ndarray, " token"]
    ) -> tuple[Int64[np.ndarray, " token"], Int64[np.ndarray, " token"]]:
        """Return the slot and the position that rows of a group come from."""
        n = self._slots(group)
        rounds, places = np.divmod(rows, n)
        slots = Permutation(derive_key("slots", self.token_store, self.seed, group), n)(places, rounds)
        positions = Permutation(derive_key("positions", self.token_store, self.seed, group), self.context_size)
        return slots, positions(rounds, slots)

    # ---- shards

    @property
    def n_shards(self) -> int:
        """Number of training shards of one hook."""
        return self.group_shards(self.n_groups - 1).stop

    @property
    def n_held_out_shards(self) -> int:
        """Number of held-out shards of one hook."""
        return math.ceil(self.held_out_rows / self.shard_tokens)

    @property
    def held_out_rows(self) -> int:
        """Held-out rows per hook."""
        return self.held_out_contexts * self.context_size

    def shard_group(self, shard: int) -> int:
        """Return the group that a shard belongs to."""
        return shard // self._shards_per_group

    def shard_rows(self, shard: int, *, held_out: bool = False) -> int:
        """Return how many rows a shard has."""
        if held_out:
            return min(self.shard_tokens, self.held_out_rows - shard * self.shard_tokens)
        group, index = divmod(shard, self._shards_per_group)
        return min(self.shard_tokens, self.group_rows(group) - index * self.shard_tokens)

    def shard_start(self, shard: int) -> int:
        """Return the number of the shard's first row among all training rows in natural order."""
        group, index = divmod(shard, self._shards_per_group)
        return group * self.group_size * self.context_size + index * self.shard_tokens

    def n_blocks(self, hook: str, shard: int, *, held_out: bool = False) -> int:
        """Return the number of blocks of a shard; the last one may be smaller."""
        return math.ceil(self.shard_rows(shard, held_out=held_out) / self.block_rows[hook])

    def shard_bytes(self, hook: str, shard: int, *, held_out: bool = False) -> int:
        """Return the size of a shard's file."""
        width = self.hooks[hook]
        rows = self.shard_rows(shard, held_out=held_out)
        return HEADER_BYTES + rows * row_bytes(width, self.dtype) + (8 * width if self.dtype == "int8" else 0)

    def places(self) -> Iterator[tuple[str, int, bool]]:
        """Go through every shard of the store, as hook, number, and whether it is held out."""
        for hook in sorted(self.hooks):
            for held_out, n in ((False, self.n_shards), (True, self.n_held_out_shards)):
                for shard in range(n):
                    yield hook, shard, held_out

    @property
    def folders(self) -> list[str]:
        """The store's folders."""
        return ["tokens", "heldout", *self.hooks, *(f"heldout/{hook}" for hook in self.hooks)]

    @property
    def total_bytes(self) -> int:
        """Size of all shard files of the store."""
        return sum(self.shard_bytes(hook, shard, held_out=held_out) for hook, shard, held_out in self.places())

    # ---- rows

    def row_tokens(self, shard: int, start: int = 0, stop: int | None = None) -> Int64[np.ndarray, " token"]:
        """Return the training token that each row of a shard belongs to, as context * context_size + position.

        Args:
            shard: Number of the shard.
            start: First row of the shard to tell.
            stop: Row of the shard to end before; None is its end.
        """
        group, index = divmod(shard, self._shards_per_group)
        stop = self.shard_rows(shard) if stop is None else stop
        slots, positions = self._sources(group, np.arange(start, stop) + index * self.shard_tokens)
        return self.group_contexts(group)[slots] * self.context_size + positions


def place(hook: str, shard: int, held_out: bool) -> str:
    """Return the path of a shard in the store, without its ending."""
    return f"{'heldout/' if held_out else ''}{hook}/{shard:06d}"


def row_bytes(width: int, dtype: str) -> int:
    """Return what a row takes on disk: its values, its float32 norm and, as int8, its float32 scale."""
    return width * STORE_DTYPES[dtype] + (8 if dtype == "int8" else 4)


def group_size(shuffle_tokens: int, context_size: int, block_rows: int) -> int:
    """Return the contexts in a whole shuffle group; see the definition."""
    contexts = max(1, shuffle_tokens // context_size)
    return contexts - contexts % block_rows if contexts > block_rows else contexts


def choose_block_rows(width: int, dtype: str, *, tokens: int, contexts: int) -> int:
    """Pick a hook's rows per block: at most 1 MiB, many of them, and none longer than a round of the shuffle.

    Reading loses speed below 1 MiB (cold 1 MiB blocks read at 0.68 GB/s, 64 KiB blocks at 0.41); the stream's shuffle
    and its lanes want about 4096 blocks, which only a small store has trouble to give.

    Args:
        width: Width of the hook's rows.
        dtype: Type on disk.
        tokens: Rows of the store.
        contexts: Contexts in a shuffle group.
    """
    fitting = _power_of_two(_BLOCK_BYTES / (width * STORE_DTYPES[dtype]))
    wanted = min(_power_of_two(tokens / _BLOCKS), _power_of_two(contexts))
    return min(fitting, max(_LEAST_BLOCK_ROWS, wanted))


def _power_of_two(value: float) -> int:
    """Return the largest power of two up to `value`, at least 1."""
    return 1 << max(0, math.floor(math.log2(value)))
