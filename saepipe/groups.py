"""A shuffle group on its way to the disk: its contexts go in as the language model reads them, its shards come out."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from saepipe.plan import Plan
from saepipe.shard import DTYPES
from saepipe.store import Store


class GroupWriter:
    """Collects the rows of one shuffle group in memory and writes those of its shards that the store still lacks.

    Memory: the group's rows times the widths of all hooks, in the store's type (the model's where that is int8).

        writer = GroupWriter(store, group)
        for start in range(0, len(writer.contexts), plan.batch_prompts):
            ids = writer.ids(start, start + plan.batch_prompts)
            writer.add(start, model.capture(ids, store.hooks))
        writer.write()
    """

    def __init__(self, store: Store, group: int | None) -> None:
        """Make room for a group.

        Args:
            store: The store.
            group: Number of the group; None stands for the held-out rows.
        """
        plan = store.plan
        self._store, self._group = store, group
        self.contexts: Int64[np.ndarray, " context"]
        """The contexts to feed, in this order and in batches of `plan.batch_prompts`."""
        if group is None:
            self.contexts = np.arange(plan.held_out_contexts)
            self._targets = np.arange(plan.held_out_rows).reshape(-1, plan.context_size)
            rows = plan.held_out_rows
        else:
            self.contexts = plan.group_contexts(group)
            self._targets = plan.group_targets(group)
            rows = plan.group_rows(group)
        self._rows = {
            hook: torch.empty(rows, plan.hooks[hook], dtype=_buffer_dtype(plan))
            for hook in store.hooks
            if not all(store.written(hook, *shard) for shard in self._shards())
        }
        self._added = np.zeros(len(self.contexts), bool)

    def _shards(self) -> list[tuple[int, bool]]:
        plan = self._store.plan
        if self._group is None:
            return [(shard, True) for shard in range(plan.n_held_out_shards)]
        return [(shard, False) for shard in plan.group_shards(self._group)]

    @property
    def hooks(self) -> list[str]:
        """The hooks that still lack a shard of this group: only these need capturing, and nothing where none does."""
        return list(self._rows)

    def ids(self, start: int, stop: int) -> Int32[np.ndarray, "context seq"]:
        """Return the token ids of `contexts[start:stop]`."""
        side = self._store.tokens.heldout if self._group is None else self._store.tokens.train
        return np.asarray(side.ids[self.contexts[start:stop]])

    def add(self, start: int, activations: Mapping[str, Float[Tensor, "context seq _"]]) -> None:
        """Take the activations of `contexts[start : start + context]`, at least those of `hooks`."""
        for hook, rows in self._rows.items():
            stop = start + len(activations[hook])
            targets = self._targets[start:stop].reshape(-1)
            values = activations[hook].reshape(-1, rows.shape[1]).to(rows.dtype).cpu().contiguous()
            kept = np.flatnonzero(targets >= 0)
            # bytes, in NumPy: torch's threads make this 100 times slower on a busy machine
            rows.view(torch.uint8).numpy()[targets[kept]] = values.view(torch.uint8).numpy()[kept]
            self._added[start:stop] = True

    def write(self, *, threads: int = 1) -> None:
        """Write the shards that the store lacks.

        Args:
            threads: Shards that are hashed and written at once.

        Raises:
            UserError: Rows that are not finite, or no space on the disk.
        """
        assert self._added.all() or not self.hooks, "every context of the group has to be added first"
        step = self._store.plan.shard_tokens

        def write(hook: str, index: int, shard: int, held_out: bool) -> None:
            if not self._store.written(hook, shard, held_out):
                rows = self._rows[hook][index * step : (index + 1) * step]
                self._store.write(hook, shard, rows, held_out=held_out)

        with ThreadPoolExecutor(threads) as pool:
            jobs = [
                pool.submit(write, hook, index, *shard)
                for hook in self._rows
                for index, shard in enumerate(self._shards())
            ]
            for job in jobs:
                job.result()


def _buffer_dtype(plan: Plan) -> torch.dtype:
    return DTYPES[plan.model.get("dtype", "float32") if plan.dtype == "int8" else plan.dtype]
