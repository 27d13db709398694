"""Train an SAE on a store: `python -m saepipe.train store.dir=... sae=topk run.dir=runs/x`.

The language model is not needed any more: model, hook and data come from the store's plan. The same command twice goes
on from the newest checkpoint, or says that the run is done. Heavy imports stand inside the functions, so that `--help`
and a mistyped key answer at once.
"""

import logging
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepipe import durable, entry, provenance
from saepipe.config import RunConfig, StreamConfig
from saepipe.errors import UserError, explained_memory
from saepipe.lock import hold
from saepipe.runs import Run

if TYPE_CHECKING:
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
    config.stream, config.sae = resolved(config, store)
    run = Run(config.run.dir)
    with hold(run.folder, key="run.dir"):
        run.refuse_another(config)
        if finished := run.summary():
            if finished["store"]["identity"] != store.plan.identity:
                raise UserError(
                    f"run.dir={run.folder} was trained on another store than store.dir={store.folder} is now; "
                    "choose another run.dir"
                )
            run.load_sae()  # a finished run whose export is damaged says so here, with the cure
            log.info("%s is already trained (%s steps); nothing to do", run.folder, f"{finished['steps']:,}")
            return finished
        durable.remove_stale(run.folder)
        sizes = {f"stream__{key}": getattr(config.stream, key) for key in ("batch_tokens", "window_tokens")}
        with durable.disk_errors("run.dir", run.folder), explained_memory("training", **sizes):
            return _train(config, store, run)


def open_store(config: RunConfig) -> "Store":
    """Open the finished store of a run.

    Raises:
        UserError: There is none, or it is incomplete; the message holds the cache command for the same overrides.
    """
    from saepipe.store import Store

    folder = Path(config.store.dir)
    if not (folder / "plan.json").is_file():
        raise UserError(f"store.dir={folder} holds no store; cache it first: {cache_command(config)}")
    store = Store.open(folder, complete=False)
    if not store.complete:
        raise UserError(
            f"store.dir={folder} is incomplete; go on with the command that began it: {cache_command(config)}"
        )
    return Store.open(folder)


def cache_command(config: RunConfig) -> str:
    """Write the cache command for what the user typed, without the keys that concern training alone."""
    keys = {text: text.lstrip("+").split("=")[0] for text in config.overrides}
    of_cache = ("model", "data", "store", "experiment")
    kept = [text for text, key in keys.items() if key.split(".")[0] in of_cache or key == "run.name"]
    return shlex.join(["python", "-m", "saepipe.cache", *kept])


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


def resolved(config: RunConfig, store: "Store") -> tuple[StreamConfig, Any]:
    """Say in full what None stands for, so that a run's config.yaml names its hook and lanes; and what a transcoder is.

    Returns:
        The stream and sae groups.

    Raises:
        UserError: A hook is not clear or not there, or `sae.apply_b_dec_to_input=true` was typed for a transcoder.
    """
    from saepipe.order import choose_lanes
    from saepipe.stream import choose_hook, choose_target

    stream, sae = config.stream, config.sae
    stream = replace(stream, hook=choose_hook(store, stream), lanes=choose_lanes(stream))
    if sae.apply_b_dec_to_input and choose_target(store, stream, str(stream.hook)) is not None:
        key = "sae.apply_b_dec_to_input"  # true by default: only who typed it means it
        if any(text.lstrip("+").startswith(f"{key}=") for text in config.overrides):
            raise UserError(
                f"{key}=true does not go with stream.target_hook={stream.target_hook}, since a transcoder's b_dec is "
                f"of that hook and not of its input; leave {key} out"
            )
        sae = replace(sae, apply_b_dec_to_input=False)
    return stream, sae


def build(config: RunConfig, store: "Store", stream: "Stream") -> "SAEModule":
    """Make the SAE with its first weights, and the module that trains it."""
    import torch

    from saepipe import saes
    from saepipe.centre import centre
    from saepipe.module import SAEModule

    total_steps = config.train.tokens // config.stream.batch_tokens
    if not total_steps:
        raise UserError(
            f"train.tokens={config.train.tokens} is less than one batch; give at least "
            f"stream.batch_tokens={config.stream.batch_tokens}"
        )
    _warn_of_schedule(config, total_steps)
    target = stream.target_hook
    sae = saes.architecture(config.sae.architecture)(config.sae, stream.d_in, stream.d_out if target else None)
    sae.initialise(
        torch.Generator().manual_seed(config.train.seed),
        mean=centre(config, store, stream),
        norm_scale=store.statistics(stream.hook).norm_scale,
        target_scale=store.statistics(target).norm_scale if target else None,
    )
    return SAEModule(
        sae,
        config.optim,
        total_steps=total_steps,
        log_every_steps=config.train.log_every_steps,
        store_identity=store.plan.identity,
    )


def _warn_of_schedule(config: RunConfig, total_steps: int) -> None:
    """Warn where a run is shorter than its warm-ups and decay, as one is after train.tokens alone was lowered."""
    warm_up, decay = config.optim.lr_warm_up_steps, config.optim.lr_decay_steps
    if warm_up + decay > total_steps:
        log.warning(
            "optim.lr_warm_up_steps=%s and optim.lr_decay_steps=%s are longer than the run's %s steps: the rate never "
            "reaches optim.lr; try optim.lr_warm_up_steps=%s optim.lr_decay_steps=%s",
            *(warm_up, decay, total_steps, total_steps // 20, total_steps // 5),
        )
    l1_warm_up = getattr(config.sae, "l1_warm_up_steps", 0)
    if l1_warm_up > total_steps:
        log.warning(
            "sae.l1_warm_up_steps=%s is longer than the run's %s steps: the penalty never reaches sae.l1_coefficient; "
            "try sae.l1_warm_up_steps=%s",
            *(l1_warm_up, total_steps, total_steps // 20),
        )


def _train(config: RunConfig, store: "Store", run: Run) -> dict[str, Any]:
    """Fit from the newest checkpoint, export, and say what came out."""
    from saepipe import checkpoints
    from saepipe.fitting import fit
    from saepipe.stream import Stream

    stream = Stream(store, config.stream, exclude_special_tokens=config.data.exclude_special_tokens)
    module = build(config, store, stream)
    restored = checkpoints.newest(run.checkpoints)
    start_step = checkpoints.step_of(restored) if restored else 0
    if not restored:
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
    device = fit(config, stream, module, run, restored)
    seconds = time.perf_counter() - began
    tokens = (module.steps_done - start_step) * config.stream.batch_tokens
    _export(config, module, stream.hook, run.sae_folder)
    summary = {
        **_summary(config, store, module, run),
        "device": device,
        "resumed_from_step": start_step,
        "seconds": round(seconds, 2),
        "tokens_per_s": round(tokens / seconds) if tokens else None,
    }
    run.finish(summary)
    log.info("trained at %s tokens/s; the SAE is in %s", f"{tokens / seconds:,.0f}", run.sae_folder)
    return summary


def _export(config: RunConfig, module: "SAEModule", hook: str, folder: Path) -> None:
    """Write the SAE where every tool of the field finds it."""
    from saepipe import export

    metadata = {
        "model_name": config.model.name,
        "model_class_name": "HookedTransformer" if config.model.compatibility_mode else "AutoModelForCausalLM",
        "hook_name": hook,
        "hook_head_index": None,
        **({"hook_name_out": config.stream.target_hook} if module.sae.is_transcoder else {}),
        "context_size": config.data.context_size,
        "prepend_bos": config.data.prepend_bos,
        "dataset_path": config.data.path,
        "exclude_special_tokens": config.data.exclude_special_tokens,
    }
    export.save(module.sae, folder, metadata=metadata, sparsity=module.density)


def _summary(config: RunConfig, store: "Store", module: "SAEModule", run: Run) -> dict[str, Any]:
    """Say what was trained, on what, by what, and how it went."""
    return {
        "run_dir": str(run.folder),
        "sae": str(run.sae_folder),
        "command": shlex.join(["python", "-m", "saepipe.train", *config.overrides]),
        "git_commit": provenance.git_commit(),
        "versions": provenance.versions("torch", "lightning"),
        "store": {"dir": config.store.dir, "identity": store.plan.identity},
        "steps": module.steps_done,
        "tokens": module.steps_done * config.stream.batch_tokens,
        "metrics": module.last_metrics,
    }


def main() -> None:
    """Run the verb from the command line."""
    entry.main("train", train)


if __name__ == "__main__":
    main()
