"""The graph of a sweep: which jobs there are, what each waits for, and what each is to do."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.sweep_folder import Stage, Task
from saepipe import grid
from saepipe.config import RunConfig
from saepipe.runs import Run


def of(
    configs: Sequence[RunConfig], root: Path, *, cached: bool
) -> tuple[list[Stage], dict[tuple[str, int], RunConfig]]:
    """Lay out the stages.

    Args:
        configs: A configuration for each job that trains: a point each, or one with a grid.
        root: The sweep's folder.
        cached: Whether the store is complete already.

    Returns:
        The stages, without those that have nothing left to do, and the configuration of each task by stage and number.
    """
    first = configs[0]
    points = [point for config in configs for point in grid.points(config)]
    found: list[tuple[Stage, list[RunConfig]]] = []
    if not cached:
        store, jobs = f"store {first.store.dir}", first.slurm.cache_jobs
        gpus = first.model.n_devices * first.cache.workers
        tokens = replace(first, cache=replace(first.cache, tokens_only=True))
        found.append((Stage("tokenise", [Task(store, str(root))]), [tokens]))
        titles = [f"{store} ({number + 1} of {jobs})" if jobs > 1 else store for number in range(jobs)]
        tasks = [Task(title, str(root)) for title in titles]
        found.append((Stage("cache", tasks, workers=first.cache.workers, gpus_per_node=gpus), [first] * jobs))
    waiting = [config for config in configs if any(not Run(point.run.dir).is_over for point in grid.points(config))]
    if waiting:  # also those that are trained, which takes no time: each evaluation waits for its own point
        waiting = [config for config in configs if any(not _evaluated(point) for point in grid.points(config))]
    if waiting:
        trainer, fused = first.trainer, bool(waiting[0].grid)
        tasks = [Task(_title(config, fused=fused), config.run.dir) for config in waiting]
        found.append(
            (Stage("train", tasks, trainer.num_nodes, trainer.devices, gpus_per_node=trainer.devices), waiting)
        )
    left = [point for point in points if not _evaluated(point)]
    if left:
        tasks = [Task(_title(point, fused=False), point.run.dir) for point in left]
        matched = [point.run.dir for point in left] == [config.run.dir for config in waiting]
        fused = any(config.grid for config in waiting)
        stage = Stage("evaluate", tasks, gpus_per_node=first.model.n_devices, each=matched, anyhow=fused)
        found.append((stage, left))
    found.append((Stage("collect", [Task("sweep", str(root))], anyhow=True), [first]))
    stages = [stage for stage, _ in found]
    for stage, before in zip(stages[1:], stages, strict=False):
        stage.after = before.name
    return stages, {(stage.name, at): one for stage, of_each in found for at, one in enumerate(of_each)}


def _evaluated(point: RunConfig) -> bool:
    return Run(point.run.dir).is_over and (Path(point.run.dir) / "features" / "index.html").exists()


def _title(config: RunConfig, *, fused: bool) -> str:
    return f"{len(grid.points(config))} points" if fused else Path(config.run.dir).name
