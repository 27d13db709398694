"""Submit a whole pipeline: `python -m launch.submit +experiment=gemma2b +sweep=l1_grid slurm=<cluster>`.

Every point is composed and checked here, then the jobs are queued with what they wait for, and the command returns.
"""

import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import batch, checks, local, points, process, slurm, snapshot, stages
from launch.checks import PlannedStore
from launch.status import alive
from launch.sweep_folder import Stage, SweepFolder
from saepipe import durable, entry, grid
from saepipe.config import RunConfig
from saepipe.durable import disk_errors
from saepipe.errors import UserError
from saepipe.lock import hold

log = logging.getLogger("saepipe.launch")


def submit(overrides: Sequence[str]) -> SweepFolder | None:
    """Submit a sweep, or a single run, from its text to its table.

    Args:
        overrides: What is typed behind the command.

    Returns:
        The submission; None with slurm.dry_run.

    Raises:
        UserError: What is wrong, of any point, or the cluster's own words; nothing is left in the queue.
    """
    configs, root = points.load(overrides)
    root = root.expanduser().resolve()
    store = checks.check(configs)
    first = configs[0]
    graph, tasks = stages.of(configs, root, cached=store.complete)
    sweep = SweepFolder.next(root)  # as it will be, for the plan; which one it is, is settled under the lock
    on_cluster = first.slurm.executor == "slurm"
    log.info("%s", described(configs, graph, store, root))
    if on_cluster:
        checks.ask_cluster(sweep, graph, first)
    if first.slurm.dry_run:
        before: dict[str | None, Stage] = {stage.name: stage for stage in graph}
        for stage in graph if on_cluster else ():
            text = batch.script(sweep, stage, first.slurm.of(stage.name), before.get(stage.after))
            log.info("\n# %s\n%s", stage.name, text)
        log.info("slurm.dry_run=true: nothing was submitted")
        return None
    with hold(root / "launch", key="run.dir"), disk_errors("run.dir", root):
        _refuse_alive(root)
        sweep = SweepFolder.next(root)
        snapshot.take(sweep.code, sweep.lock)
        for (name, index), config in tasks.items():
            entry.save_config(config, sweep.config_file(name, index))
        command = shlex.join(["python", "-m", "launch.submit", *overrides])
        sweep.write(graph, executor=first.slurm.executor, command=command, time=time.time())
        if on_cluster:
            _submit_all(sweep, graph, first)
        else:
            _start_here(sweep)
    log.info("submitted; python -m launch.status %s", shlex.quote(str(root)))
    return sweep


def _refuse_alive(root: Path) -> None:
    try:
        before = SweepFolder.newest(root)
    except UserError:
        return
    if left := alive(before):
        raise UserError(
            f"run.dir={root} has {left} jobs of an earlier submission in the queue; wait for them, or python -m "
            f"launch.cancel {root}"
        )


def _submit_all(sweep: SweepFolder, graph: list[Stage], config: RunConfig) -> None:
    """Queue the stages in their order; where one is refused, those before it leave the queue again."""
    done: dict[str, Stage] = {}
    try:
        for stage in graph:
            batch.submit(sweep, stage, config.slurm.of(stage.name), done.get(stage.after or ""))
            done[stage.name] = stage
            sweep.write(graph)
    except BaseException:
        jobs = [task.job_id for stage in graph for task in stage.tasks if task.job_id]
        try:
            slurm.cancel(list(slurm.queued(jobs)))
        except UserError as error:
            log.warning("%s; these jobs are left in the queue: %s", error, " ".join(jobs))
        raise


def _start_here(sweep: SweepFolder) -> None:
    """Have a process of its own, which outlives this one, run the stages."""
    sweep.logs.mkdir(parents=True, exist_ok=True)
    with (sweep.logs / "runner.log").open("ab") as file:
        runner = subprocess.Popen(
            [sys.executable, "-m", "launch.local", str(sweep.folder)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=batch.frozen_environment(sweep),
            start_new_session=True,
        )
    durable.write_text(sweep.folder / local.RUNNER, process.name(runner.pid))


def described(configs: Sequence[RunConfig], graph: Sequence[Stage], store: PlannedStore, root: Path) -> str:
    """Lay the plan out: what is trained, jobs, GPU-hours, bytes."""
    first = configs[0]
    each = [point for config in configs for point in grid.points(config)]
    names = " and ".join(sorted({point.sae.architecture for point in each}))
    lines = [
        f"{root}: {len(each)} point{'s' if each[1:] else ''} of {names}, "
        f"{first.train.tokens:,} tokens each, in global batches of {first.stream.batch_tokens:,}"
    ]
    lines += [f"  {Path(point.run.dir).name}" for point in each] if each[1:] else []
    lines.append("")
    rows: list[tuple[str, ...]] = [
        ("stage", "jobs", "nodes", "ranks", "GPUs", "hours at most", "GPU-hours at most", "after")
    ]
    total = 0.0
    for stage in graph:
        profile = first.slurm.of(stage.name)
        hours = profile.time_min / 60
        gpus = stage.gpus_per_node * stage.nodes if profile.gres else 0
        total += gpus * hours * len(stage.tasks)
        numbers = (len(stage.tasks), stage.nodes, stage.nodes * stage.ranks_per_node, gpus)
        limits = (f"{hours:g}", f"{gpus * hours * len(stage.tasks):g}") if first.slurm.executor == "slurm" else ("", "")
        rows.append((stage.name, *map(str, numbers), *limits, stage.after or ""))
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", *_bytes(each, store, root)]
    if first.slurm.executor == "slurm":
        lines.append(
            f"{total:,.4g} GPU-hours at most, where no stage takes longer than its limit; one that does goes on in "
            "another job"
        )
    return "\n".join(lines)


def _bytes(points: Sequence[RunConfig], store: PlannedStore, root: Path) -> list[str]:
    if not store.widths:
        return []
    weights = sum(_weights_bytes(point, store) for point in points) / 1e9
    size = f"{store.bytes / 1e9:,.3g} GB"
    if store.complete:
        stored = f"{size} stored already in {store.folder}"
    else:
        stored = f"{size} to be stored in {store.folder} ({store.free_bytes / 1e9:,.3g} GB free)"
    return [f"{stored}; {weights:,.3g} GB of weights and checkpoints in {root}"]


def _weights_bytes(point: RunConfig, store: PlannedStore) -> float:
    """Bytes that a run leaves: two checkpoints of weights and Adam's two moments, and the exports."""
    from saepipe.stream import choose_hook

    hook = choose_hook(store, point.stream)
    parameters = 2 * store.width(hook) * point.sae.resolve(store.width(hook))
    return 4.0 * parameters * (2 * 3 + 1 + point.train.n_checkpoints)


def main() -> None:
    """Submit from the command line."""
    entry.prepare_process()
    given = sys.argv[1:]
    if {"-h", "--help"} & set(given):
        sys.stdout.write(f"{__doc__}\nKeys are those of saepipe.train; slurm=NAME is a file of conf/slurm.\n")
        return
    with entry.polite_end():
        submit([argument for argument in given if argument not in ("-m", "--multirun")])


if __name__ == "__main__":
    main()
