"""A small store for tests, written as the cache verb writes one, with activations that tell where they are from."""

import dataclasses
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from saepipe import durable, processes
from saepipe.config import StoreConfig
from saepipe.groups import GroupWriter
from saepipe.lock import hold
from saepipe.plan import Plan
from saepipe.shard import DTYPES
from saepipe.store import Store
from saepipe.token_store import TokenStore
from saepipe.token_writer import TokenStoreWriter

CONTEXT_SIZE = 8
HOOKS = {"blocks.0.hook_resid_post": 6, "blocks.1.hook_resid_post": 4}


ROLES = ["template", "user", "assistant"]


def make_tokens(folder: Path, train: int = 24, heldout: int = 5, *, chat: bool = False) -> TokenStore:
    """Write a token store (or open it): id 0 begins every context, id 1 stands in some places, both special.

    Of a chat, the first two tokens of a context are the template's, the next three the user's.
    """
    if (folder / "plan.json").exists():
        return TokenStore.open(folder)
    source = {"data.path": "small.txt"}
    roles = np.array([[0, 0, 1, 1, 1, 2, 2, 2]], np.uint8)
    with TokenStoreWriter(folder, context_size=CONTEXT_SIZE, source=source, with_roles=chat) as writer:
        for side, contexts in (("train", train), ("heldout", heldout)):
            for context in range(contexts):
                ids = (np.arange(CONTEXT_SIZE, dtype=np.int32)[None] + context + 12) % 17 + 1
                ids[:, 0] = 0
                writer.append(side, ids, np.full_like(ids, context // 3), ids < 2, *([roles] if chat else []))
        return writer.finish(special_ids=[0, 1], roles=ROLES if chat else ())


def make_plan(token_store: TokenStore, /, **changes: Any) -> Plan:
    """Plan 190 rows in groups of 8 contexts and shards of 24 rows; `changes` are fields of the plan or store keys."""
    store = {
        "tokens": 190,
        "shard_tokens": 24,
        "shuffle_tokens": 72,
        "batch_prompts": 3,
        "dtype": "bfloat16",
        "seed": 5,
    }
    store |= {key: changes.pop(key) for key in list(changes) if key in store}
    fields = {"model": {"name": "small"}, "hooks": HOOKS, "data": {"path": "small.txt"}} | changes
    return Plan.make(token_store, StoreConfig(**store), capture="huggingface", device_kind="cpu", threads=2, **fields)


def big(**changes: object) -> Plan:
    """A plan of a hundred thousand contexts, whose token store need not be there."""
    fields: dict[str, object] = {
        "token_store": "00ff",
        "contexts": 100_000,
        "held_out_contexts": 500,
        "context_size": 128,
        "model": {"name": "m", "dtype": "float32"},
        "hooks": {"blocks.2.hook_resid_post": 128},
        "capture": "huggingface",
        "device_kind": "cpu",
        "threads": 2,
        "dtype": "bfloat16",
        "tokens": 12_000_000,
        "shard_tokens": 65_536,
        "shuffle_tokens": 262_144,
        "block_rows": {"blocks.2.hook_resid_post": 512},
        "batch_prompts": 32,
        "seed": 0,
        "data": {"path": "a.txt"},
    }
    return Plan(**(fields | changes))  # type: ignore[arg-type]


def activations(contexts: np.ndarray, width: int) -> torch.Tensor:
    """Return [context, position, width]: two channels hold the row's number (see `row_numbers`), the others noise."""
    rows = contexts[:, None] * CONTEXT_SIZE + np.arange(CONTEXT_SIZE)
    values = np.sin(rows[:, :, None] * 1.7 + np.arange(width) ** 2)
    values[:, 0] *= 500  # the attention sink
    values[:, :, 0], values[:, :, 1] = rows // 128, rows % 128
    return torch.from_numpy(values.astype(np.float32))


def row_numbers(rows: torch.Tensor) -> np.ndarray:
    """Return the row number that each of the `activations` carries."""
    return (rows[:, 0].double() * 128 + rows[:, 1].double()).long().numpy()


def build(folder: Path, **changes: Any) -> Store:
    """Make the store, or go on with it."""
    with hold(folder, key="store.dir"):
        tokens = make_tokens(folder / "tokens")
        store = Store.create(folder, make_plan(tokens, **changes), tokens)
        for group in store.missing_groups():
            writer = GroupWriter(store, group)
            for start in range(0, len(writer.contexts), store.plan.batch_prompts):
                contexts = writer.contexts[start : start + store.plan.batch_prompts]
                writer.add(start, {hook: activations(contexts, store.width(hook)) for hook in writer.hooks})
            writer.write()
        if not store.complete:
            store.finalise()
    return store


def numbered(
    folder: Path,
    *,
    hooks: dict[str, int],
    block_rows: dict[str, int],
    rows: int = 12_800,
    dtype: str = "bfloat16",
    chat: bool = False,
    sinks: tuple[str, ...] = (),
) -> Store:
    """Write a store of up to 1600 contexts whose rows carry their token's number (see `row_numbers`).

    The other channels are `row_numbers % 7 + 1`, and 400 times that at position 0 where the hook is in `sinks`.
    """
    with hold(folder, key="store.dir"):
        tokens = make_tokens(folder / "tokens", train=1600, heldout=1, chat=chat)
        plan = make_plan(tokens, hooks=hooks, tokens=rows, shard_tokens=1000, shuffle_tokens=3000, dtype=dtype)
        # fewer and larger blocks than a store of this size has by itself, to save time
        plan = dataclasses.replace(plan, block_rows=block_rows)
        store = Store.create(folder, plan, tokens)
        for hook, shard, held_out in plan.places():
            numbers = np.arange(plan.shard_rows(shard, held_out=True)) if held_out else plan.row_tokens(shard)
            scale = np.where((numbers % CONTEXT_SIZE == 0) & (hook in sinks), 400, 1)
            others = [(numbers % 7 + 1) * scale] * (hooks[hook] - 2)
            values = torch.from_numpy(np.stack([numbers // 128, numbers % 128, *others], axis=1))
            store.write(hook, shard, values.to(torch.float32 if dtype == "int8" else DTYPES[dtype]), held_out=held_out)
        store.finalise()
    return store


def files(folder: Path) -> dict[str, bytes]:
    """Read every file of a store except the lock."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def left_behind(path: Path, host: str = "") -> Path:
    """Name a temporary file of a process that has ended, here or on another machine."""
    hidden = durable.temporary(path)
    mine = f"{processes.host()}-{os.getpid()}-"
    return hidden.with_name(hidden.name.replace(mine, f"{host or processes.host()}-999999999-"))


def kill_before_step(n: int, *steps: tuple[object, str]) -> None:
    """Have this process kill itself before the n-th call, all counted together, of the functions of some owners."""
    left = n

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **names: object) -> object:
            nonlocal left
            left -= 1
            if not left:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **names)

        return call

    for owner, name in steps:
        setattr(owner, name, counted(getattr(owner, name)))
