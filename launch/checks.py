"""Everything that can be known to go wrong, looked at on the machine that submits, before a job waits in a queue."""

import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch import batch, slurm
from launch.sweep_folder import Stage, SweepFolder
from saepipe import entry, grid
from saepipe.config import RunConfig
from saepipe.errors import UserError, explained, unknown
from saepipe.runs import Run

log = logging.getLogger("saepipe.launch")

ONE_OF_ALL = ("model", "data", "store", "cache", "trainer", "slurm")
"""Groups that every point of a sweep must share: it has one store, and jobs of one size."""

_NAME_BYTES = 255
_PERHAPS = "node configuration is not available"


@dataclass
class PlannedStore:
    """What a store is, or will be once it is cached."""

    folder: Path
    hooks: list[str]
    widths: dict[str, int]
    """Empty where the model is out of reach, of a dry run."""
    complete: bool
    bytes: float
    """Size of it when it is finished."""
    free_bytes: int
    """What its disk has free."""

    def width(self, hook: str) -> int:
        """Return the width of a hook's rows."""
        if hook not in self.hooks:
            raise unknown("stream.hook", hook, self.hooks, "Those are the model.hooks that are cached.")
        return self.widths.get(hook, 0)


def check(configs: Sequence[RunConfig]) -> PlannedStore:
    """Look at every point of a sweep; folders become absolute.

    Args:
        configs: A configuration for each job that trains.

    Returns:
        The store.

    Raises:
        UserError: What is wrong with some point, or with what all share.
    """
    first = configs[0]
    _refuse_folders(configs)
    _refuse_different(configs)
    for config in configs:
        paths = ((config.store, "dir"), (config.run, "dir"), (config.train, "init_from"), (config.train, "store_copy"))
        for group, key in paths:
            if (value := getattr(group, key)) is not None:
                setattr(group, key, str(Path(value).resolve()))
    try:
        store = _store(first)
    except UserError as error:
        if not first.slurm.dry_run:
            raise
        log.warning("not checked, and the size of the store not known: %s", error)
        store = PlannedStore(Path(first.store.dir), list(first.model.hooks), {}, False, math.nan, 0)
    for config in configs:
        for point in grid.points(config):
            with explained(f"run.dir={point.run.dir}"):
                _check_point(point, store)
    _check_cluster(first)
    return store


def _refuse_different(configs: Sequence[RunConfig]) -> None:
    first = configs[0]
    for config in configs:
        for name in ONE_OF_ALL:
            if different := entry.differences(getattr(first, name), getattr(config, name), name):
                key, (one, other) = next(iter(different.items()))
                raise UserError(
                    f"{key} is {one} for one point and {other} for another; a sweep has one store, and jobs of one "
                    "size: submit a sweep for each"
                )


def _refuse_folders(configs: Sequence[RunConfig]) -> None:
    """Refuse folders that two points share, that are not beside each other, or that cannot be named in a job."""
    folders = [Path(config.run.dir) for config in configs]
    if twice := [folder for at, folder in enumerate(folders) if folder in folders[:at]]:
        raise UserError(f"two points of the sweep are {twice[0].name}; give each value once")
    if apart := [folder for folder in folders if folder.parent != folders[0].parent]:
        raise UserError(
            f"run.dir is in {folders[0].parent} for one point and in {apart[0].parent} for another; a sweep has one "
            "folder, so sweep over no key of run"
        )
    if long := [part for folder in folders for part in folder.parts if len(part.encode()) > _NAME_BYTES]:
        raise UserError(f"run.dir has a folder of {len(long[0])} letters, {long[0][:40]}...; give a shorter run.name")
    root = entry.sweep_of(folders[0]) or folders[0]
    for letter in ":%" if configs[0].slurm.executor == "slurm" else ":":
        if letter in str(root.resolve()):
            raise UserError(
                f"run.dir={root} holds a {letter!r}, which means something else in the paths that jobs are given; "
                "choose another run.name or run.dir"
            )


def _store(config: RunConfig) -> PlannedStore:
    """Find a store, or work out what it will be; the model and the data must be there, without being loaded."""
    from saepipe.language_model import LanguageModel
    from saepipe.plan import Plan
    from saepipe.projection import room
    from saepipe.sources import Source
    from saepipe.store import Store
    from saepipe.train import adopt_plan

    folder = Path(config.store.dir)
    model = LanguageModel.open(replace(config.model, device="cpu", n_devices=1, device_map=None))
    model.check_context(config.data.context_size)
    if Plan.found(folder) is not None:
        opened = Store.open(folder, complete=False)
        # Keys that differ are refused: of a store that is there those that were typed; what is still to be done is done
        # to the whole configuration.
        asked = config.overrides if opened.complete else [f"{key}=" for key in opened.plan.settings()]
        adopt_plan(replace(config, overrides=asked), opened)
        if opened.complete:
            widths = {hook: opened.width(hook) for hook in opened.hooks}
            return PlannedStore(folder, list(opened.hooks), widths, True, opened.plan.total_bytes, 0)
    Source.open(config.data, seed=config.store.seed)
    with explained("store.dir"):
        needed = room(config, model)
    widths = {hook: model.width(hook) for hook in config.model.hooks}
    return PlannedStore(folder, list(config.model.hooks), widths, False, needed.bytes, needed.free_bytes)


def _check_point(point: RunConfig, store: PlannedStore) -> None:
    """Refuse what training would refuse."""
    from saepipe.run_length import total_steps
    from saepipe.stream import check_ranks
    from saepipe.train import resolved
    from saepipe.untrained import refuse_unfit

    wanted = replace(point, trainer=replace(point.trainer, accelerator="auto"))  # the nodes' is not this machine's
    wanted.stream, wanted.sae = resolved(point, store)
    world_size = point.trainer.devices * point.trainer.num_nodes
    if store.widths:
        refuse_unfit(wanted, store, world_size)
    else:  # of a dry run that does not reach the model
        check_ranks(wanted.stream, world_size)
        total_steps(wanted, world_size)
    Run(point.run.dir).refuse_another(wanted)


def _check_cluster(config: RunConfig) -> None:
    """Refuse jobs that are larger than the cluster, as far as its profile describes it."""
    profile, trainer = config.slurm, config.trainer
    if profile.executor == "local":
        if trainer.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={trainer.num_nodes} does not go with slurm=local, which is one machine; give more "
                "trainer.devices, or a cluster"
            )
        return
    if profile.nodes is not None and trainer.num_nodes > profile.nodes:
        raise UserError(
            f"trainer.num_nodes={trainer.num_nodes} is more than the {profile.nodes} nodes that the cluster has"
        )
    most = profile.gpus_per_node
    if most is not None and trainer.devices > most:
        raise UserError(
            f"trainer.devices={trainer.devices} is more than the {most} GPUs of a node; give more trainer.num_nodes"
        )
    if profile.min_nodes is not None and profile.min_nodes > trainer.num_nodes:
        raise UserError(
            f"slurm.min_nodes={profile.min_nodes} is more than trainer.num_nodes={trainer.num_nodes}; lower it"
        )
    accelerated = trainer.accelerator in ("cuda", "gpu") or config.model.device.startswith("cuda")
    if accelerated and profile.gres is None:
        raise UserError(
            f"slurm.gres=null asks for no GPU, which trainer.accelerator={trainer.accelerator} and "
            f"model.device={config.model.device} need; set slurm.gres=gpu"
        )


def ask_cluster(sweep: SweepFolder, stages: Sequence[Stage], config: RunConfig) -> None:
    """Have the cluster look at the jobs: partition, account, limits; of a dry run, what it says is a warning.

    Raises:
        UserError: It would refuse them; its words are in the message.
    """
    if not slurm.there():
        if config.slurm.dry_run:
            return
        raise UserError(
            "slurm.executor=slurm needs sbatch, which this machine has not; submit from a login node, or look at the "
            "plan with slurm.dry_run=true"
        )
    with tempfile.TemporaryDirectory() as folder:
        for stage in stages:
            profile = config.slurm.of(stage.name)
            if words := batch.refusal(sweep, stage, profile, Path(folder)):
                told = f"the cluster would refuse the stage {batch.asked(stage, profile)}: {words}"
                # Said of nodes that are drained, too, for which a job may wait: submitting will tell.
                if not (config.slurm.dry_run or _PERHAPS in words):
                    raise UserError(told)
                log.warning("%s", told)
