"""Which rows of a store a stream leaves out, by what the store knows of every token.

So another choice of tokens needs no other store.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from saepipe.config import StreamConfig
from saepipe.store import Store


@dataclass(frozen=True)
class RowFilter:
    """Keeps the rows that pass every condition that is set."""

    exclude_special_tokens: bool
    """Drop special tokens and position 0."""
    positions: tuple[int, int] | None = None
    """First and last position in the context that is kept."""
    max_norm: float | None = None
    """Drop rows longer than this many times the hook's mean norm (in a pair, by either hook)."""
    roles: tuple[str, ...] | None = None
    """Roles of chat data whose tokens are kept."""

    @classmethod
    def of(cls, stream: StreamConfig, *, exclude_special_tokens: bool) -> "RowFilter":
        """Take the conditions from the configuration."""
        return cls(
            exclude_special_tokens,
            positions=None if stream.positions is None else (stream.positions[0], stream.positions[1]),
            max_norm=stream.max_norm,
            roles=None if stream.roles is None else tuple(sorted(set(stream.roles))),
        )

    @property
    def text(self) -> str:
        """The filter in words, which go into the key of the order; empty where it keeps every row."""
        parts = {
            "special": "out" if self.exclude_special_tokens else None,
            "positions": None if self.positions is None else "{}-{}".format(*self.positions),
            "max_norm": None if self.max_norm is None else repr(float(self.max_norm)),
            "roles": None if self.roles is None else ",".join(self.roles),
        }
        return ";".join(f"{name}={value}" for name, value in parts.items() if value is not None)

    def mask(self, store: Store, hooks: Sequence[str], shard: int) -> Bool[np.ndarray, " token"]:
        """Return which rows of a shard are kept.

        Raises:
            UserError: A role that the data does not have, or a shard whose norms cannot be read.
        """
        side, rows = store.tokens.train, store.plan.row_tokens(shard)
        kept = side.ordinary(rows) if self.exclude_special_tokens else np.ones(len(rows), bool)
        if self.positions is not None:
            position = rows % store.plan.context_size
            kept &= (self.positions[0] <= position) & (position <= self.positions[1])
        if self.roles is not None:
            kept &= side.in_roles(rows, self.roles)
        if self.max_norm is not None:
            for hook in hooks:
                kept &= store.norm(hook, shard) <= self.max_norm * store.statistics(hook).mean_norm
        return kept
