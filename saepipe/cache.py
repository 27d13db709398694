"""Cache activations: `python -m saepipe.cache model.name=... data.path=... store.dir=acts`.

Text is packed into contexts, a language model reads them, and what passes its hook points goes to disk, shuffled. The
same command again goes on where it was stopped, however it was stopped, and ends with the same bytes. It may also run
many times at once: `cache.workers=4` on one machine, `srun` or an array job on several; all work on one store.
`cache.dry_run=true` prints the projected bytes and time, and writes nothing; `cache.tokens_only=true` stops once the
text is tokenised.
"""

import logging
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepipe import entry, workers
from saepipe.config import RunConfig
from saepipe.durable import disk_errors
from saepipe.errors import explained_memory
from saepipe.lock import hold
from saepipe.workers import Worker

if TYPE_CHECKING:
    from saepipe.language_model import LanguageModel
    from saepipe.store import Store

log = logging.getLogger(__name__)


def cache(config: RunConfig) -> dict[str, Any]:
    """Make the store of a configuration, or finish it.

    Returns once the store is complete and verified, whoever did the work.

    Args:
        config: The run; model, data and store decide the store.

    Returns:
        dir, rows (per hook), bytes, and of this process seconds and tokens_per_s (None where there was nothing to do);
        with cache.dry_run the `Projection` instead.

    Raises:
        UserError: A model, hook, data set or column that is not there, too few tokens, a folder of another plan, a disk
            that is too small, activations that are not finite, or out of memory.
    """
    config = entry.settled(config)
    mine, *helpers = _place(config).split(config.cache.workers)
    with workers.started(help_cache, workers.alone(config), helpers if _shares_work(config) else []):
        return help_cache(config, mine)


def _place(config: RunConfig) -> Worker:
    """Find this process' place among those that were started with it."""
    import torch

    worker = Worker.here(os.environ)
    if torch.cuda.device_count() == config.model.n_devices * config.cache.workers:
        return replace(worker, local_rank=0)  # it sees its own GPUs only, as under `srun --gpus-per-task`
    return worker


def _shares_work(config: RunConfig) -> bool:
    with disk_errors("store.dir", Path(config.store.dir)):
        complete = (Path(config.store.dir) / "manifest.json").exists()
    return not (config.cache.dry_run or config.cache.tokens_only or complete)


def help_cache(config: RunConfig, worker: Worker) -> dict[str, Any]:
    """Be one of the processes that make a store; see `cache`."""
    from saepipe.language_model import LanguageModel
    from saepipe.plan import Plan
    from saepipe.projection import project
    from saepipe.sources import Source

    folder = Path(config.store.dir)
    Plan.found(folder)  # refuses a folder of something else before the model is loaded
    model = LanguageModel.open(config.model, local_rank=worker.local_rank)
    model.check_context(config.data.context_size)
    source = Source.open(config.data, seed=config.store.seed)
    with explained_memory(
        "caching",
        store__batch_prompts=config.store.batch_prompts,
        data__context_size=config.data.context_size,
        store__shuffle_tokens=config.store.shuffle_tokens,
        model__dtype="bfloat16",
    ):
        if config.cache.dry_run:
            projection = asdict(project(config, model, workers=worker.count))
            log.info("cache.dry_run=true: nothing was written")
            return projection
        if not (worker.index or config.cache.tokens_only or (folder / "manifest.json").exists()):
            project(config, model, workers=worker.count)
        with hold(folder, key="store.dir", wait=True):
            if config.cache.tokens_only:
                return _tokens_only(config, model, source, folder)
            store = _prepared(config, model, source, folder)
        return _completed(store, model, worker)


def _tokens(config: RunConfig, model: "LanguageModel", source: Any, folder: Path) -> Any:
    from saepipe import tokens

    return tokens.build(
        folder / "tokens", source, model.tokenizer, tokens=config.store.tokens, vocab_size=model.vocab_size
    )


def _tokens_only(config: RunConfig, model: "LanguageModel", source: Any, folder: Path) -> dict[str, Any]:
    start = time.perf_counter()
    read = _tokens(config, model, source, folder)
    log.info("%s holds the tokens; the same command without cache.tokens_only goes on from there", folder)
    return {"dir": str(folder), "rows": read.train.ids.size, "seconds": time.perf_counter() - start}


def _prepared(config: RunConfig, model: "LanguageModel", source: Any, folder: Path) -> "Store":
    """Make or find the tokens and the plan."""
    import torch

    from saepipe import shuffle
    from saepipe.plan import Plan
    from saepipe.store import Store

    read = _tokens(config, model, source, folder)
    plan = Plan.make(
        read,
        config.store,
        model=model.identity,
        hooks={hook: model.width(hook) for hook in config.model.hooks},
        capture=model.capture_path,
        device_kind=model.device.type,
        threads=torch.get_num_threads() if model.device.type == "cpu" else 0,
        data={key.removeprefix("data."): value for key, value in source.identity.items() if key.startswith("data.")},
    )
    if Plan.found(folder) is None:
        shuffle.check(plan, refuse=config.cache.poor_shuffle == "refuse")
    return Store.create(folder, plan, read)


def _completed(store: "Store", model: "LanguageModel", worker: Worker) -> dict[str, Any]:
    """Write what is missing of a store, and verify it."""
    from saepipe.capturing import fill
    from saepipe.claims import CLAIMS

    result = {"dir": str(store.folder), "rows": store.rows, "bytes": store.plan.total_bytes}
    what = f"{store.rows:,} tokens of {', '.join(store.hooks)}"
    if store.complete and not store.missing_groups():
        log.info("store.dir=%s is complete already: %s", store.folder, what)
        return {**result, "seconds": 0.0, "tokens_per_s": None}
    start = time.perf_counter()
    captured = fill(store, model, worker)
    seconds = time.perf_counter() - start
    with hold(store.folder, key="store.dir", wait=True):
        if not store.complete:
            store.finalise()
        shutil.rmtree(store.folder / CLAIMS, ignore_errors=True)  # of processes that were killed
    log.info("store.dir=%s is complete: %s", store.folder, what)
    return {**result, "seconds": seconds, "tokens_per_s": captured / seconds if captured else None}


def main() -> None:
    """Run the verb from the command line."""
    entry.main("cache", cache)


if __name__ == "__main__":
    main()
