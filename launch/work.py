"""What a task does, once its job has a place to run: `python -m launch.work SWEEP STAGE NUMBER`, in each rank."""

import hashlib
import logging
import os
import shutil
import sys
from pathlib import Path

from launch.sweep_folder import SweepFolder
from saepipe import entry, grid
from saepipe.config import RunConfig
from saepipe.errors import UserError
from saepipe.lock import LOCK
from saepipe.runs import Run
from saepipe.stopping import end_at_once

log = logging.getLogger("saepipe.launch")


def work(sweep: SweepFolder, stage: str, index: int) -> None:
    """Do what a task is about; what is done already takes no time, so that a requeue goes on.

    Raises:
        UserError: What the user can put right.
        SystemExit: A signal came; the same task goes on.
    """
    config = sweep.config(stage, index)
    if stage in ("tokenise", "cache"):
        from saepipe.cache import cache

        cache(config)
    elif stage == "train":
        _train(config)
    elif stage == "evaluate":
        _evaluate(config)
    else:
        from launch.collect import collect

        collect(sweep.run_dir)


def _train(config: RunConfig) -> None:
    from saepipe.train import train

    if config.slurm.executor == "slurm":  # with min_nodes it may be fewer than were asked for
        config.trainer.num_nodes = int(os.environ.get("SLURM_STEP_NUM_NODES", config.trainer.num_nodes))
    if scratch := config.slurm.of("train").scratch:
        config.train.store_copy = staged(config.store.dir, scratch)
    try:
        train(config)
    except UserError as error:
        points = grid.points(config)
        if not config.grid or any(not Run(point.run.dir).is_over for point in points):
            raise
        log.warning("saepipe: %s", error)  # of a grid the frozen points are told, and the others are evaluated


def _evaluate(config: RunConfig) -> None:
    from saepipe.analyze import analyze
    from saepipe.evaluate import evaluate

    if why := Run(config.run.dir).failure():
        log.warning("saepipe: %s was frozen, there is nothing to evaluate: %s", config.run.dir, why)
        return
    evaluate(config)
    analyze(config)


def staged(store: str, scratch: str) -> str:
    """Copy a store to a disk of this node, once for all of its ranks, and return where it is.

    Args:
        store: The store's folder.
        scratch: Where to; variables such as $TMPDIR are filled in on the node.

    Raises:
        UserError: A variable that is not set there, or a full disk.
    """
    from saepipe.durable import copy_folder, disk_errors
    from saepipe.lock import hold

    place = Path(os.path.expandvars(scratch)).expanduser()
    if "$" in str(place):
        raise UserError(f"slurm.scratch={scratch} has no meaning on this node, where it is {place}; set the variable")
    source, manifest = Path(store), "manifest.json"
    which = hashlib.sha256(str(source).encode() + (source / manifest).read_bytes()).hexdigest()[:12]
    target = place / f"{source.name}-{which}"
    with hold(place / f".{target.name}", key="slurm.scratch", wait=True), disk_errors("slurm.scratch", target):
        if not (target / manifest).exists():
            log.info("copying %s to %s", store, target)
            copy_folder(source, target, leave_out=[manifest, LOCK])
            shutil.copy2(source / manifest, target / manifest)  # last: it says that the others are there
    return str(target)


def main() -> None:
    """Do a task named on the command line."""
    folder, stage, index = sys.argv[1:]
    if stage == "train":
        end_at_once()
    entry.prepare_process()
    with entry.polite_end():
        work(SweepFolder(folder), stage, int(index))


if __name__ == "__main__":
    main()
