"""How a stage becomes jobs of SLURM: batch scripts and submissions, through submitit."""

import math
import os
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import SlurmExecutor

from launch import slurm
from launch.supervise import supervise
from launch.sweep_folder import Stage, SweepFolder, Task
from saepipe.cluster import SlurmConfig
from saepipe.errors import UserError


class Executor(SlurmExecutor):
    """submitit's executor, which here can also be made where there is no SLURM, to show what it would submit."""

    @classmethod
    def affinity(cls) -> int:
        """Say that it can be had."""
        return 2

    def _num_tasks(self) -> int:
        return 1  # `supervise`, whatever it starts; `nodes` may be a range


def executor(sweep: SweepFolder, stage: Stage, profile: SlurmConfig, dependency: str | None) -> Executor:
    """Make the executor of a stage's jobs.

    Args:
        sweep: The submission; its code comes first where the jobs import from.
        stage: The stage.
        profile: The cluster's profile, with what differs for the stage.
        dependency: What its jobs wait for, as sbatch has it.
    """
    made = Executor(sweep.logs / stage.name, python=profile.python)
    gres = f"{profile.gres}:{stage.gpus_per_node}" if profile.gres and stage.gpus_per_node else None
    nodes: Any = stage.nodes
    ranks: int | None = stage.ranks_per_node
    cpus = profile.cpus_per_rank * stage.workers
    mem_gb = (profile.mem_gb or 0) * stage.workers * stage.ranks_per_node
    if stage.name == "train" and profile.min_nodes and profile.min_nodes < stage.nodes:
        nodes = f"{profile.min_nodes}-{stage.nodes}"
        # A number of tasks per node would have SLURM count the tasks of the fewest nodes, and give no more.
        ranks, cpus = None, cpus * stage.ranks_per_node
    more = {"requeue": True, "kill-on-invalid-dep": "yes", **profile.sbatch_args}
    settings = {
        "job_name": f"{sweep.run_dir.name}-{stage.name}",
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "time": profile.time_min,
        "signal_delay_s": profile.signal_delay_s,
        "nodes": nodes,
        "ntasks_per_node": ranks,
        "cpus_per_task": cpus,
        "mem": f"{mem_gb:g}G" if mem_gb else None,
        "gres": gres,
        "mail_user": profile.mail_user,
        "mail_type": profile.mail_type,
        "dependency": dependency,
        "array_parallelism": profile.array_parallelism,
        "setup": setup(sweep, profile),
        "stderr_to_stdout": True,
        "use_srun": False,  # `supervise` starts the ranks, as many as there are nodes for
        "wckey": None,
        "additional_parameters": more,
    }
    made.update_parameters(**{key: value for key, value in settings.items() if value is not None})
    return made


def frozen_environment(sweep: SweepFolder) -> dict[str, str]:
    """Return this process' environment with the frozen code first, for a process that is started here."""
    before = os.environ.get("PYTHONPATH")
    path = f"{sweep.code}{os.pathsep}{before}" if before else str(sweep.code)
    return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}


def setup(sweep: SweepFolder, profile: SlurmConfig) -> list[str]:
    """Word what a job's shell does before Python starts."""
    path = f"export PYTHONPATH={shlex.quote(str(sweep.code))}${{PYTHONPATH:+:$PYTHONPATH}}"
    given = [f"export {name}={shlex.quote(str(value))}" for name, value in profile.environment.items()]
    own = ["set -e", *profile.setup, "set +e"] if profile.setup else []  # a module that is not there ends the job
    # Without PYTHONSAFEPATH, the folder that the job begins in comes before the frozen code.
    return [*own, *given, path, "export PYTHONSAFEPATH=1"]


def script(sweep: SweepFolder, stage: Stage, profile: SlurmConfig, before: Stage | None) -> str:
    """Write the batch script of a stage, as it would be submitted; what it waits for has no number yet."""
    made = executor(sweep, stage, profile, f"{_kind(stage, before)}:<{before.name}>" if before else None)
    if stage.tasks[1:]:
        made.parameters["map_count"] = len(stage.tasks)
    return made._make_submission_file_text(made._submitit_command_str, "submission")


def refusal(sweep: SweepFolder, stage: Stage, profile: SlurmConfig, folder: Path) -> str | None:
    """Ask the cluster whether it would take a stage's jobs; nothing is submitted.

    Returns:
        Its words where it would not.
    """
    file = folder / f"{stage.name}.sh"
    lines = script(sweep, stage, profile, None).splitlines()
    file.write_text("\n".join(line for line in lines if "--array" not in line))
    done = slurm.call("sbatch", "--test-only", str(file))
    return None if done.returncode == 0 else slurm.words(done.stderr)


@dataclass(frozen=True)
class Part:
    """Tasks of a stage that are one array."""

    numbers: range
    """Which they are."""
    at_once: int | None
    """Most of them at a time."""
    after: int | None = None
    """Number of the part that has to be over before, since all of them together would be too many at a time."""


def parts(count: int, size: int, at_once: int | None) -> list[Part]:
    """Divide a stage's tasks among arrays that the cluster takes.

    Args:
        count: How many tasks there are.
        size: Most tasks of an array.
        at_once: Most tasks of the stage at a time.
    """
    arrays = math.ceil(count / size)
    ranges = [range(count * at // arrays, count * (at + 1) // arrays) for at in range(arrays)]
    if at_once is None:
        return [Part(numbers, None) for numbers in ranges]
    shares = [max(1, at_once // arrays + (at < at_once % arrays)) for at in range(arrays)]
    return [Part(numbers, shares[at], at - at_once if at >= at_once else None) for at, numbers in enumerate(ranges)]


def submit(sweep: SweepFolder, stage: Stage, profile: SlurmConfig, before: Stage | None) -> None:
    """Submit a stage's jobs as arrays that the cluster takes, and write their ids into its tasks.

    Args:
        sweep: The submission.
        stage: The stage.
        profile: The cluster's profile, with what differs for the stage.
        before: The stage that its jobs wait for, submitted.

    Raises:
        UserError: The cluster does not take them; its words are in the message.
    """
    divided = parts(len(stage.tasks), slurm.largest_array(), profile.array_parallelism)
    for part in divided:
        waits = [dependency(stage, before, part.numbers)]
        if part.after is not None:
            waits.append(f"afterany:{_array_of(stage.tasks[divided[part.after].numbers[0]])}")
        wanted = replace(profile, array_parallelism=part.at_once)
        made = executor(sweep, stage, wanted, ",".join(filter(None, waits)) or None)
        try:
            with made.batch():
                jobs = [made.submit(supervise, str(sweep.folder), stage.name, number) for number in part.numbers]
            for number, job in zip(part.numbers, jobs, strict=True):
                stage.tasks[number].job_id = job.job_id
        except Exception as error:  # submitit wraps what sbatch says
            raise UserError(
                f"the cluster does not take the stage {asked(stage, profile)}: {slurm.words(str(error))}"
            ) from error


def asked(stage: Stage, profile: SlurmConfig) -> str:
    """Name a stage and what its jobs ask for, by the keys that decide it."""
    names = ("partition", "account", "qos", "constraint", "gres", "cpus_per_rank", "mem_gb", "time_min")
    keys = [f"slurm.{name}={value}" for name in names if (value := getattr(profile, name)) is not None]
    return f"{stage.name} ({stage.ranks_per_node} ranks on each of {stage.nodes} nodes, {', '.join(keys)})"


def dependency(stage: Stage, before: Stage | None, numbers: range) -> str | None:
    """Word what jobs of a stage wait for."""
    if before is None:
        return None
    tasks = [before.tasks[number] for number in numbers] if stage.each else before.tasks
    return ":".join([_kind(stage, before), *dict.fromkeys(map(_array_of, tasks))])


def _kind(stage: Stage, before: Stage) -> str:
    """How a stage waits, as sbatch has it: a job of an array can wait for that of the same number."""
    if stage.each and before.tasks[1:]:
        return "aftercorr"
    return "afterany" if stage.anyhow else "afterok"


def _array_of(task: Task) -> str:
    assert task.job_id is not None
    return task.job_id.split("_")[0]
