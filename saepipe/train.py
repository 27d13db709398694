"""Train an SAE on a store: `python -m saepipe.train store.dir=... sae=topk run.dir=runs/x`.

The language model is not needed any more: model, hook and data come from the store's plan. The same command twice goes
on from the newest checkpoint, or says that the run is done. Heavy imports stand inside the functions, so that `--help`
and a mistyped key answer at once.
"""

import logging
import shlex
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepipe import durable, entry, grid
from saepipe.config import RunConfig, StreamConfig
from saepipe.errors import UserError, explained_memory
from saepipe.lock import hold
from saepipe.runs import Run
from saepipe.stopping import end_at_once

if TYPE_CHECKING:
    from saepipe.launched import Launch
    from saepipe.store import Store
    from saepipe.stream import HasHooks

log = logging.getLogger(__name__)


def train(config: RunConfig) -> dict[str, Any]:
    """Train one SAE, or a grid of them, and leave finished run folders.

    Each holds config.yaml, metrics.csv, checkpoints, `sae/` and `summary.json`.

    Args:
        config: The run; `saepipe.entry.load_config("train", [...])` makes one.

    Returns:
        What `summary.json` holds: final metrics, tokens per second, versions, the store's identity, paths. Of a grid,
        `points`: that of each folder.

    Raises:
        UserError: No store, another plan, a folder of another run, a value out of range, out of memory; or a point of
            the grid was not finite, which is told when the others are done.
        SystemExit: A signal came; a checkpoint was saved between two steps.
    """
    from saepipe.launched import Launch
    from saepipe.untrained import refuse_unfit

    config = entry.settled(config)
    store = open_store(config)
    adopt_plan(config, store)
    points = grid.points(config)
    for point in points:
        point.stream, point.sae = resolved(point, store)
    launch = Launch.here()
    if launch is None and config.trainer.num_nodes > 1:
        raise UserError(
            f"trainer.num_nodes={config.trainer.num_nodes} needs ranks on as many machines, which srun or torchrun "
            "starts; run this command under one of them"
        )
    if launch:
        launch.check(config.trainer, typed=config.typed("trainer.devices") or config.typed("trainer.num_nodes"))
        launch.quieten()
    for point in points:  # before a folder is made or a rank is started
        refuse_unfit(point, store, launch.ranks.world_size if launch else config.trainer.devices)
    with ExitStack() as stack:
        for point in points if launch is None or launch.ranks.rank == 0 else ():
            stack.enter_context(hold(point.run.dir, key="run.dir"))
            durable.remove_stale(Path(point.run.dir))
        left = [point for point in points if not _done(point, store)]
        for together in _together(left):
            _train(together, store, launch)
    summaries = {point.run.dir: Run(point.run.dir).summary() for point in points}
    if failures := [f"{point.run.dir}: {why}" for point in points if (why := Run(point.run.dir).failure())]:
        others = f"{len(failures)} of {len(points)} points were frozen, the others are done: " if points[1:] else ""
        raise UserError(others + "; ".join(failures))
    if not config.grid:
        return summaries[config.run.dir] or {}
    return {"run_dir": config.run.dir, "points": summaries}


def _done(config: RunConfig, store: "Store") -> bool:
    """Tell whether nothing is left to do for a run; refuse a folder that holds another."""
    run = Run(config.run.dir)
    run.refuse_another(config)
    finished = run.summary()
    if finished is None:
        return run.failure() is not None
    if finished["store"]["identity"] != store.plan.identity:
        raise UserError(
            f"run.dir={run.folder} was trained on another store than store.dir={store.folder} is now; choose another "
            "run.dir"
        )
    run.load_sae()  # a finished run whose export is damaged says so here, with the cure
    log.info("%s is already trained (%s steps); nothing to do", run.folder, f"{finished['steps']:,}")
    return True


def _together(left: list[RunConfig]) -> list[list[RunConfig]]:
    """Part the points that cannot go on from one step, as when some of them were begun alone."""
    if len(left) < 2:
        return [left] if left else []
    from saepipe import checkpoints

    folders = [Run(point.run.dir).checkpoints for point in left]
    steps = [path and checkpoints.step_of(path) for path in map(checkpoints.newest, folders)]
    if not any(steps) or checkpoints.newest_common(folders):
        return [left]
    return [[point for point, at in zip(left, steps, strict=True) if at == step] for step in dict.fromkeys(steps)]


def _train(points: list[RunConfig], store: "Store", launch: "Launch | None") -> None:
    """Train points in this process, or in ranks that it starts and waits for."""
    from saepipe import rank_processes
    from saepipe.launched import Launch

    trainer = points[0].trainer
    if launch is None and (trainer.devices > 1 or trainer.strategy == "ddp"):
        rank_processes.run(train_rank, points, trainer.devices)
        return
    run_job(points, store, launch or Launch.alone())


def train_rank(points: list[RunConfig], launch: "Launch") -> None:
    """Be one of the ranks that train points together."""
    run_job(points, open_store(points[0]), launch)


def run_job(points: list[RunConfig], store: "Store", launch: "Launch") -> None:
    """Train points, and word what a full disk or memory says."""
    from saepipe.job import Job

    folder = Path(points[0].run.dir)
    sizes = {
        "train__micro_batches": str(2 * points[0].train.micro_batches),
        "stream__window_tokens": f"{points[0].stream.window_tokens // 2} (a smaller window, in another run.dir)",
    }
    with durable.disk_errors("run.dir", folder), explained_memory("training", **sizes):
        Job(points, store, launch).run()


def open_store(config: RunConfig) -> "Store":
    """Open the finished store of a run.

    Raises:
        UserError: There is none, or it is incomplete; the message holds the cache command for the same overrides.
    """
    from saepipe.store import Store

    key = "train.store_copy" if config.train.store_copy else "store.dir"
    folder = Path(config.train.store_copy or config.store.dir)
    if not (folder / "plan.json").is_file():
        raise UserError(f"{key}={folder} holds no store; cache it first: {cache_command(config)}")
    store = Store.open(folder, complete=False)
    if not store.complete:
        raise UserError(f"{key}={folder} is incomplete; go on with the command that began it: {cache_command(config)}")
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


def resolved(config: RunConfig, store: "HasHooks") -> tuple[StreamConfig, Any]:
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
        key = "sae.apply_b_dec_to_input"
        if config.named(key):  # true by default: only who typed it means it
            raise UserError(
                f"{key}=true does not go with stream.target_hook={stream.target_hook}, since a transcoder's b_dec is "
                f"of that hook and not of its input; leave {key} out"
            )
        sae = replace(sae, apply_b_dec_to_input=False)
    return stream, sae


def main() -> None:
    """Run the verb from the command line."""
    end_at_once()
    entry.main("train", train)


if __name__ == "__main__":
    # From the module by its own name, by which a launcher's processes on other machines find its functions.
    from saepipe.train import main

    main()
