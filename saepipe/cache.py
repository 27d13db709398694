"""Cache activations: `python -m saepipe.cache model.name=... data.path=... store.dir=acts`.

Text is packed into contexts, a language model reads them, and what passes its hook points goes to disk, shuffled. The
same command again goes on where it was stopped, however it was stopped, and ends with the same bytes.
`cache.dry_run=true` prints the projected bytes and time, and writes nothing.
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepipe import entry, progress
from saepipe.config import RunConfig
from saepipe.durable import disk_errors
from saepipe.errors import UserError, explained_memory
from saepipe.lock import hold

if TYPE_CHECKING:
    from saepipe.language_model import LanguageModel
    from saepipe.store import Store

log = logging.getLogger(__name__)

_TIMING_S = 1.0


def cache(config: RunConfig) -> dict[str, Any]:
    """Make the store of a configuration, or finish it.

    Args:
        config: The run; model, data and store decide the store.

    Returns:
        dir, rows (per hook), bytes, and of this call seconds and tokens_per_s (None where there was nothing to do).

    Raises:
        UserError: A model, hook, data set or column that is not there, too few tokens, a folder of another plan, a disk
            that is too small, activations that are not finite, or out of memory.
    """
    from saepipe.language_model import LanguageModel
    from saepipe.sources import Source
    from saepipe.store import existing_plan

    folder = Path(config.store.dir)
    existing_plan(folder)
    model = LanguageModel.open(config.model)
    model.check_context(config.data.context_size)
    source = Source.open(config.data, seed=config.store.seed)
    with explained_memory(
        "caching",
        store__batch_prompts=config.store.batch_prompts,
        data__context_size=config.data.context_size,
        store__shuffle_tokens=config.store.shuffle_tokens,
        model__dtype="bfloat16",
    ):
        if config.cache.dry_run or not (folder / "manifest.json").exists():
            projected = _projected(config, model, folder)
            if config.cache.dry_run:
                return projected
        with hold(folder, key="store.dir"):
            store = _prepared(config, model, source, folder)
            return _completed(store, model)


# ---- the projection


def _projected(config: RunConfig, model: "LanguageModel", folder: Path) -> dict[str, Any]:
    """Say what the store will cost, and refuse what the disk or the memory cannot hold."""
    from saepipe.plan import HEADER_BYTES, HELD_OUT_ROWS, ITEM_BYTES

    wanted, share = config.store, config.data.held_out
    rows = wanted.tokens + round(min(HELD_OUT_ROWS, wanted.tokens * share / (1 - share)))
    width = sum(model.width(hook) for hook in config.model.hooks)
    per_hook = 4 + HEADER_BYTES / wanted.shard_tokens  # norm, and the share of the header
    row_bytes = width * ITEM_BYTES[wanted.dtype] + len(config.model.hooks) * per_hook + 9  # id, document, mask
    with disk_errors("store.dir", folder):
        needed = rows * row_bytes - sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
    memory = 2 * min(wanted.shuffle_tokens, rows) * width * ITEM_BYTES[wanted.dtype]  # see _write_groups
    if needed > free:
        fitting = int(0.9 * free / row_bytes)
        fewer = f"store.tokens={fitting}, store.dtype=bfloat16, or " if fitting else ""
        raise UserError(
            f"store.dir={folder} needs {needed / 1e9:.3g} GB more and its disk has {free / 1e9:.3g} GB free; try "
            f"{fewer}a store.dir on another disk"
        )
    if memory > _memory_bytes():
        raise UserError(
            f"store.shuffle_tokens={wanted.shuffle_tokens} needs {memory / 1e9:.3g} GB of memory and the machine has "
            f"{_memory_bytes() / 1e9:.3g} GB; halve it (and store.shard_tokens), or cache fewer model.hooks at a time"
        )
    speed = _tokens_per_s(config, model)
    seconds = max(0.0, needed / row_bytes / speed)
    log.info(
        f"store.dir={folder}: {wanted.tokens:,} tokens of {', '.join(config.model.hooks)}, about {_duration(seconds)} "
        f"at {speed:,.0f} tokens/s ({model.capture_path} on {model.device}), {rows * row_bytes / 1e9:.3g} GB on disk "
        f"({free / 1e9:.3g} GB free), {memory / 1e9:.3g} GB of memory to shuffle in"
    )
    size = round(rows * row_bytes)
    return {"dir": str(folder), "rows": wanted.tokens, "bytes": size, "seconds": seconds, "tokens_per_s": speed}


def _memory_bytes() -> float:
    """Return the machine's memory; without limit where it cannot be asked (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return math.inf


def _tokens_per_s(config: RunConfig, model: "LanguageModel") -> float:
    """Time the model on random tokens: whole batches, or as many contexts as take a second."""
    import torch

    hooks, seq = config.model.hooks, config.data.context_size

    def seconds(contexts: int) -> float:
        ids = torch.randint(model.vocab_size, (contexts, seq), generator=torch.Generator().manual_seed(0))
        start = time.perf_counter()
        for found in model.capture(ids, hooks).values():
            found.cpu()  # waits for the device
        return time.perf_counter() - start

    seconds(1)  # what is set up at the first call does not count
    contexts = 1
    while (last := seconds(contexts)) < _TIMING_S and contexts < config.store.batch_prompts:
        contexts = min(4 * contexts, config.store.batch_prompts)
    times = [last]
    while sum(times) < _TIMING_S and len(times) < 10:
        times.append(seconds(contexts))
    return contexts * seq / min(times)


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{hours:.1f} h" if hours >= 1 else f"{minutes:.0f} min" if minutes >= 1.5 else f"{seconds:.0f} s"


# ---- the store


def _prepared(config: RunConfig, model: "LanguageModel", source: Any, folder: Path) -> "Store":
    """Make or find the tokens and the plan."""
    from saepipe import tokens
    from saepipe.plan import Plan
    from saepipe.store import Store

    read = tokens.build(
        folder / "tokens", source, model.tokenizer, tokens=config.store.tokens, vocab_size=model.vocab_size
    )
    plan = Plan.make(
        read,
        config.store,
        model=model.identity,
        hooks={hook: model.width(hook) for hook in config.model.hooks},
        capture=model.capture_path,
        device_kind=model.device.type,
        data={key.removeprefix("data."): value for key, value in source.identity.items() if key.startswith("data.")},
    )
    return Store.create(folder, plan, read)


def _completed(store: "Store", model: "LanguageModel") -> dict[str, Any]:
    """Write what is missing of a store, and verify it."""
    result = {"dir": str(store.folder), "rows": store.rows, "bytes": store.plan.total_bytes}
    missing = store.missing_groups()
    what = f"{store.rows:,} tokens of {', '.join(store.hooks)}"
    if store.complete and not missing:
        log.info("store.dir=%s is complete already: %s", store.folder, what)
        return {**result, "seconds": 0.0, "tokens_per_s": None}
    seconds, written = _write_groups(store, model, missing)
    store.finalise()
    log.info("store.dir=%s is complete: %s", store.folder, what)
    return {**result, "seconds": seconds, "tokens_per_s": written / seconds if written else None}


def _write_groups(store: "Store", model: "LanguageModel", groups: Sequence[int | None]) -> tuple[float, int]:
    """Capture and write shuffle groups; returns the seconds and the tokens that it took.

    One thread writes a group while the model reads the next: so two groups are in memory at once.
    """
    import torch

    from saepipe.groups import GroupWriter

    start = time.perf_counter()
    plan = store.plan
    rows = {group: plan.held_out_rows if group is None else plan.group_rows(group) for group in groups}
    with (
        ThreadPoolExecutor(1, "writer") as thread,
        progress.bar("cache", sum(rows.values())) as bar,
    ):
        writing: Future[None] | None = None
        for group in groups:
            writer = GroupWriter(store, group)
            for first in range(0, len(writer.contexts), plan.batch_prompts):
                ids = torch.from_numpy(writer.ids(first, first + plan.batch_prompts).astype("int64"))
                writer.add(first, model.capture(ids, writer.hooks))
                bar.update(min(ids.numel(), rows[group] - first * plan.context_size))
                if writing is not None and writing.done():
                    writing.result()  # a full disk is told at once, not a group later
            if writing is not None:
                writing.result()
            writing = thread.submit(writer.write)
        if writing is not None:
            writing.result()
    return time.perf_counter() - start, sum(rows.values())


def main() -> None:
    """Run the verb from the command line."""
    entry.main("cache", cache)


if __name__ == "__main__":
    main()
