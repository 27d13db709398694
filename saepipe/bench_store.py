"""Stores of random rows for the bench, made by the code that the cache verb writes with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from saepipe.config import RunConfig, StreamConfig
from saepipe.errors import UserError
from saepipe.lock import hold
from saepipe.plan import Plan
from saepipe.shard import DTYPES
from saepipe.store import Store
from saepipe.token_store import TokenStore
from saepipe.token_writer import TokenStoreWriter

HOOK = "blocks.0.hook_resid_post"
WIDTH = 768
"""Width of a row: gpt2-small's."""
LARGER = 4
"""How many times `bench.gb` the larger store has: a window is then a part of it, as it is of any store in use."""
_CHUNK = 4096


def random_tokens(folder: Path, *, contexts: int, context_size: int, vocab_size: int) -> TokenStore:
    """Write a token store of random training contexts, each with a special token in front."""
    random = np.random.default_rng(0)
    with TokenStoreWriter(folder, context_size=context_size, source={"data.path": "bench"}) as writer:
        for start in range(0, contexts, _CHUNK):
            ids = random.integers(1, vocab_size, (min(_CHUNK, contexts - start), context_size), dtype=np.int32)
            ids[:, 0] = 0
            documents = np.repeat(np.arange(start, start + len(ids), dtype=np.int32)[:, None], context_size, axis=1)
            writer.append("train", ids, documents, ids == 0)
        return writer.finish(special_ids=[0])


def synthetic(config: RunConfig, parent: Path, gb: float, width: int = WIDTH) -> Store:
    """Make a store of about `gb` GB, or open the one that was made so before.

    Raises:
        UserError: It would hold less than two batches.
    """
    rows = int(gb * 1e9) // (width * DTYPES[config.store.dtype].itemsize)
    if rows < 2 * config.stream.batch_tokens:
        least = 2.1 * config.stream.batch_tokens * width * DTYPES[config.store.dtype].itemsize / 1e9
        raise UserError(
            f"bench.gb={config.bench.gb} makes a store of {rows} rows, less than two batches of "
            f"stream.batch_tokens={config.stream.batch_tokens}; give at least bench.gb={least:.2g}"
        )
    folder, size = parent / f"{rows}-rows-of-{width}", config.data.context_size
    if folder.exists():
        return Store.open(folder)
    with hold(folder, key="bench.dir"):
        tokens = random_tokens(
            folder / "tokens", contexts=-(-rows // size), context_size=size, vocab_size=np.iinfo(np.uint16).max
        )
        plan = Plan.make(
            tokens,
            replace(config.store, tokens=rows),
            model={"name": "random"},
            hooks={HOOK: width},
            capture="huggingface",
            device_kind="cpu",
            threads=1,
            data={"path": "random"},
        )
        store = Store.create(folder, plan, tokens)
        noise = torch.randn(min(rows, plan.shard_tokens), width, generator=torch.Generator().manual_seed(0))
        values = noise.to(torch.float32 if config.store.dtype == "int8" else DTYPES[config.store.dtype])
        for hook, shard, _ in plan.places():
            store.write(hook, shard, values[: plan.shard_rows(shard)])
        store.finalise()
    return store


def of_random_rows(stream: StreamConfig) -> StreamConfig:
    """Leave out what a store of random rows has not: other hooks, roles, rows to filter."""
    return replace(stream, hook=None, target_hook=None, positions=None, max_norm=None, roles=None)


def shard_files(store: Store) -> list[Path]:
    """Return a store's shards in natural order."""
    return [store.folder / HOOK / f"{shard:06d}.safetensors" for shard in range(store.plan.n_shards)]
