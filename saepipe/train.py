"""Train an SAE on a store: `python -m saepipe.train store.dir=... sae=topk run.dir=runs/x`.

The language model is not needed any more: model, hook and data come from the store's plan. The same command twice goes
on from the newest checkpoint, or says that the run is done. Heavy imports stand inside the functions, so that `--help`
and a mistyped key answer at once.
"""

import logging
import platform
import shlex
import subprocess
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import saepipe
from saepipe import durable, entry
from saepipe.config import RunConfig
from saepipe.errors import UserError, explained_memory
from saepipe.lock import hold
from saepipe.runs import Run

if TYPE_CHECKING:
    import torch

    from saepipe.module import SAEModule
    from saepipe.store import Store
    from saepipe.stream import Stream

log = logging.getLogger(__name__)


def train(config: RunConfig) -> dict[str, Any]:
    """Train one SAE and leave a finished run folder: config, metrics, checkpoints, `sae/` and `summary.json`.

    Args:
        config: The run; `saepipe.entry.load_config("train", [...])` makes one.

    Returns:
        What `summary.json` holds: final metrics, tokens per second, versions, the store's identity, paths.

    Raises:
        UserError: No store, another plan, a folder of another run, a value out of range, out of memory.
    """
    store = open_store(config)
    adopt_plan(config, store)
    run = Run(config.run.dir)
    with hold(run.folder, key="run.dir"):
        run.refuse_another(config)
        if finished := run.summary():
            log.info("%s is already trained (%s steps); nothing to do", run.folder, f"{finished['steps']:,}")
            return finished
        durable.remove_stale(run.folder)
        sizes = {
            "stream__batch_tokens": config.stream.batch_tokens,
            "stream__window_tokens": config.stream.window_tokens,
        }
        sizes = {f"stream__{key}": getattr(config.stream, key) for key in ("batch_tokens", "window_tokens")}
        with durable.disk_errors("run.dir", run.folder), explained_memory("training", **sizes):
            return _train(config, store, run)


def open_store(config: RunConfig) -> "Store":
    """Open the finished store of a run.

    Raises:
        UserError: There is none, or it is incomplete; the message holds the cache command for the same overrides.
    """
    from saepipe.store import Store

    if not Path(config.store.dir).is_dir():
        raise UserError(f"store.dir={config.store.dir} does not exist; cache it first: {cache_command(config)}")
    return Store.open(Path(config.store.dir))


def cache_command(config: RunConfig) -> str:
    """Write the cache command for what the user typed, without the keys that concern training alone."""
    keys = {text: text.lstrip("+").split("=")[0] for text in config.overrides}
    of_cache = ("model", "data", "store", "experiment")
    kept = [text for text, key in keys.items() if key.split(".")[0] in of_cache or key == "run.name"]
    return " ".join(["python -m saepipe.cache", *(shlex.quote(text) for text in kept)])


def adopt_plan(config: RunConfig, store: "Store") -> None:
    """Take model, data and store keys from the store's plan; what the user typed must agree with it.

    Raises:
        UserError: A typed key differs from the plan's; the message names the key and both values.
    """
    for key, planned in store.plan.settings().items():
        group, name = key.split(".", 1)
        section = getattr(config, group)
        if not hasattr(section, name):
            continue
        mine = getattr(section, name)
        free = name == "revision"  # the plan's is the commit that the typed branch was at
        if config.typed(key) and not free and not entry.agree(mine, planned):
            raise UserError(
                f"{key}={mine} differs from the store's: {store.folder} was made with {key}={planned}; "
                "leave the key out, or cache another store.dir"
            )
        setattr(section, name, planned)


def build(config: RunConfig, store: "Store", stream: "Stream") -> "SAEModule":
    """Make the SAE with its first weights, and the module that trains it."""
    import torch

    from saepipe import saes
    from saepipe.module import SAEModule

    total_steps = config.train.tokens // config.stream.batch_tokens
    if not total_steps:
        raise UserError(
            f"train.tokens={config.train.tokens} is less than one batch; give at least "
            f"stream.batch_tokens={config.stream.batch_tokens}"
        )
    sae = saes.architecture(config.sae.architecture)(config.sae, stream.d_in)
    statistics = store.statistics(stream.hook)
    generator = torch.Generator().manual_seed(config.train.seed)
    sae.initialise(generator, mean=statistics.mean, norm_scale=statistics.norm_scale)
    return SAEModule(sae, config.optim, total_steps=total_steps, log_every_steps=config.train.log_every_steps)


def _train(config: RunConfig, store: "Store", run: Run) -> dict[str, Any]:
    """Fit from the newest checkpoint, export, and say what came out."""
    from saepipe import checkpoints
    from saepipe.stream import Stream

    stream = Stream(store, config.stream, exclude_special_tokens=config.data.exclude_special_tokens)
    module = build(config, store, stream)
    restored = checkpoints.newest(run.checkpoints)
    start_step = checkpoints.step_of(restored) if restored else 0
    entry.save_config(config, run.config_file)
    log.info(
        "training %s, %s latents, on %s of %s: %s steps of %s tokens%s",
        config.sae.architecture,
        f"{module.sae.d_sae:,}",
        stream.hook,
        store.folder,
        f"{module.total_steps:,}",
        f"{config.stream.batch_tokens:,}",
        f", going on from step {start_step:,}" if restored else "",
    )
    began = time.perf_counter()
    device = _fit(config, stream, module, run, restored)
    seconds = time.perf_counter() - began
    _export(config, module, stream.hook, run.sae_folder)
    summary = {
        **_summary(config, store, module, run),
        "device": device,
        "resumed_from_step": start_step,
        "seconds": round(seconds, 2),
        "tokens_per_s": round((module.steps_done - start_step) * config.stream.batch_tokens / seconds),
    }
    run.finish(summary)
    log.info("trained at %s tokens/s; the SAE is in %s", f"{summary['tokens_per_s']:,}", run.sae_folder)
    return summary


def _fit(config: RunConfig, stream: "Stream", module: "SAEModule", run: Run, restored: Path | None) -> str:
    """Run Lightning's loop over the batches that are left, and return the device's name."""
    import lightning.pytorch as pl

    from saepipe.checkpoints import AtomicCheckpointIO, Checkpoints, step_of
    from saepipe.loggers import close, open_loggers
    from saepipe.module import Batches

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # its tips and device table say nothing of this run
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)")  # lightning 2.6 under torch 2.13
    opened = open_loggers(config, start_step=step_of(restored) if restored else 0)
    try:
        trainer = pl.Trainer(
            accelerator=config.trainer.accelerator,
            devices=1,
            precision=config.trainer.precision,  # type: ignore[arg-type]  # TrainerConfig checks it
            max_epochs=1,
            logger=opened,
            plugins=[AtomicCheckpointIO()],
            callbacks=[Checkpoints(run.checkpoints, config.train.checkpoint_every_steps)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        trainer.fit(module, Batches(stream, module, config.stream.batch_tokens), ckpt_path=restored)
    finally:
        close(opened)
    return device_name(trainer.strategy.root_device)


def device_name(device: "torch.device") -> str:
    """Name a device as its vendor does."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _export(config: RunConfig, module: "SAEModule", hook: str, folder: Path) -> None:
    """Write the SAE where every tool of the field finds it."""
    from saepipe import export

    metadata = {
        "model_name": config.model.name,
        "model_class_name": "HookedTransformer" if config.model.compatibility_mode else "AutoModelForCausalLM",
        "hook_name": hook,
        "hook_head_index": None,
        "context_size": config.data.context_size,
        "prepend_bos": config.data.prepend_bos,
        "dataset_path": config.data.path,
        "exclude_special_tokens": config.data.exclude_special_tokens,
    }
    export.save(module.sae, folder, metadata=metadata, sparsity=module.density)


def _summary(config: RunConfig, store: "Store", module: "SAEModule", run: Run) -> dict[str, Any]:
    """Say what was trained, on what, by what, and how it went."""
    import lightning
    import torch

    return {
        "run_dir": str(run.folder),
        "sae": str(run.sae_folder),
        "command": " ".join(["python -m saepipe.train", *(shlex.quote(text) for text in config.overrides)]),
        "git_commit": _git_commit(),
        "versions": {
            "saepipe": saepipe.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
        "store": {"dir": config.store.dir, "identity": store.plan.identity},
        "steps": module.steps_done,
        "tokens": module.steps_done * config.stream.batch_tokens,
        "metrics": module.last_metrics,
    }


def _git_commit() -> str | None:
    """Commit of the checkout that runs, with a + where files differ from it; None for an installed package."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        changed = subprocess.run(
            ["git", "status", "--porcelain", "."], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")


def main() -> None:
    """Run the verb from the command line."""
    entry.main("train", train)


if __name__ == "__main__":
    main()
