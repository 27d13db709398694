"""A job's first process: it starts the ranks, waits, and alone decides whether the job is over or has to be requeued.

The ranks save and end at a signal (`saepipe.watch`); they do not know of a scheduler. submitit starts this process.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from launch import process, slurm
from launch.sweep_folder import Outcome, SweepFolder
from saepipe import grid
from saepipe.cluster import SlurmConfig
from saepipe.config import RunConfig

FRUITLESS = 3
"""Starts in a row that came no further, after which a task has failed: one that dies at once would requeue for ever.
Those that a preemption cut short do not count: it may come at any time."""
_CANCELLED = ("CANCELLED", "DEADLINE")
"""States of a job that somebody ends for good."""
_REQUEUED = ("PENDING", "PREEMPTED", "REQUEUED", "REQUEUE_HOLD", "NODE_FAIL", "BOOT_FAIL")
"""States of a job that the scheduler requeues itself; in all others (RUNNING, SIGNALING, TIMEOUT) that is done here."""
_LOOKED_AT_S = 60
"""How much earlier than asked for a signal may come, since SLURM looks at the limits every 30 s."""
_OF_THE_BATCH = ("SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK")
"""What SLURM says of the batch step's one task, which srun would hold against its own arguments."""
_STOPPED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGKILL)


def supervise(folder: str, stage: str, index: int) -> str:
    """Run a task in this job.

    Args:
        folder: The submission's folder.
        stage: Which stage.
        index: Which of its tasks.

    Returns:
        What became of it: done or requeued.

    Raises:
        SystemExit: It failed or was cancelled, which its dependents are to see.
    """
    sweep = SweepFolder(folder)
    config = sweep.config(stage, index)
    profile = config.slurm.of(stage)
    job = os.environ.get("SLURM_JOB_ID") if profile.executor == "slurm" else None
    here = os.environ.get("SLURM_JOB_NODELIST") or os.uname().nodename
    marks = progress(config, stage)
    number = tries(sweep, stage, index, marks)
    named = process.name(os.getpid())
    sweep.begin(stage, index, job=job, nodes=here, process=named, progress=marks, tries=number)
    if sweep.is_cancelled(stage, index):  # after the start is written: who cancels looks at it after writing that
        sweep.end(stage, index, Outcome.on_request())
        raise SystemExit(1)
    environment = dict(os.environ)
    for name in _OF_THE_BATCH:
        environment.pop(name, None)
    if job:  # else each rank would take every core of a node that it shares
        environment.setdefault("OMP_NUM_THREADS", str(profile.cpus_per_rank))
    else:  # a batch script has done it
        environment |= own_environment(profile, environment)
    code, stopped = _run(command(sweep, stage, index, environment), environment, sweep.log_file(stage, index))
    # Without a scheduler nobody but launch.cancel, or who else ends processes, sends a signal here.
    state = slurm.patient_state(job) if job else "CANCELLED" if stopped else "RUNNING"
    outcome = judge(code, state, sweep, stage, index)
    sweep.end(stage, index, outcome)
    if outcome.state == "requeued" and job is None:
        return supervise(folder, stage, index)
    if outcome.state == "requeued" and job is not None and state not in _REQUEUED:
        slurm.requeue(job)
    if outcome.state in ("failed", "cancelled"):
        raise SystemExit(code if 0 < code < 256 else 1)
    return outcome.state


def own_environment(profile: SlurmConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """Return a profile's own variables; to PYTHONPATH it adds, since the frozen code has to come first there."""
    given = {name: str(value) for name, value in profile.environment.items()}
    if "PYTHONPATH" in given and environment.get("PYTHONPATH"):
        given["PYTHONPATH"] = f"{environment['PYTHONPATH']}{os.pathsep}{given['PYTHONPATH']}"
    return given


def command(sweep: SweepFolder, stage: str, index: int, environment: Mapping[str, str]) -> list[str]:
    """Word how the task's processes are started: by srun in a job of SLURM, else one that starts others itself."""
    config = sweep.config(stage, index)
    profile = config.slurm.of(stage)
    python = shlex.split(profile.python) if profile.python else [sys.executable]
    work = [*python, "-u", "-m", "launch.work", str(sweep.folder), stage, str(index)]
    if profile.executor != "slurm":
        return work
    nodes, ranks = 1, 1
    if stage == "train":
        nodes = int(environment.get("SLURM_JOB_NUM_NODES") or environment.get("SLURM_NNODES") or 1)
        ranks = config.trainer.devices
        nodes = fitting(nodes, ranks, config)
    options = [f"--nodes={nodes}", f"--ntasks={nodes * ranks}", f"--ntasks-per-node={ranks}"]
    # Unbuffered, else a progress bar, which ends no line, would not be seen.
    options += [f"--cpus-per-task={profile.cpus_per_rank}", "--kill-on-bad-exit=1", "--unbuffered"]
    return ["srun", *options, *profile.srun_args, *work]


def fitting(nodes: int, ranks: int, config: RunConfig) -> int:
    """Return how many of the nodes that a job was given have ranks among which the stream can be divided."""
    from saepipe.order import choose_lanes

    lanes = choose_lanes(config.stream)
    return next((count for count in range(nodes, 0, -1) if lanes % (count * ranks) == 0), nodes)


def judge(code: int, state: str, sweep: SweepFolder, stage: str, index: int) -> Outcome:
    """Decide what the end of a task's processes means.

    Args:
        code: Exit code; negative for the signal that killed a process here.
        state: What the scheduler says of the job.
        sweep: The submission.
        stage: Which stage.
        index: Which of its tasks.
    """
    words = sweep.last_words(stage, index)
    if code == 0:
        return Outcome("done")
    if sweep.is_cancelled(stage, index):
        return Outcome.on_request()
    if state in _CANCELLED:
        return Outcome("cancelled", "its job was cancelled")
    if state in _REQUEUED:
        return Outcome("requeued", f"the job was {state}", interrupted=True)
    number = -code if code < 0 else code - 128
    if state != "TIMEOUT" and number not in _STOPPED:
        return Outcome("failed", words or f"exit code {code}")
    name = "its time limit" if state == "TIMEOUT" else signal.Signals(number).name
    start, config = sweep.starts(stage, index)[-1], sweep.config(stage, index)
    profile = config.slurm.of(stage)
    limit_s = 60 * profile.time_min - profile.signal_delay_s
    early = time.time() - start["time"] < limit_s - _LOOKED_AT_S and state != "TIMEOUT" and number != signal.SIGKILL
    if not early and start["tries"] >= FRUITLESS and start["progress"] == progress(config, stage):
        return Outcome(
            "failed",
            f"ended by {name} {FRUITLESS} times in a row without a step forward; where that was the time limit, raise "
            f"slurm.time_min={profile.time_min}; {words}",
        )
    return Outcome("requeued", f"ended by {name}", interrupted=early)


def tries(sweep: SweepFolder, stage: str, index: int, marks: list[int]) -> int:
    """Count the starts in a row, with the one to come, that came no further than some progress."""
    starts, end = sweep.starts(stage, index), sweep.outcome(stage, index)
    if not starts or starts[-1]["progress"] != marks:
        return 1
    return int(starts[-1]["tries"]) + (end is None or not end.interrupted)


def progress(config: RunConfig, stage: str) -> list[int]:
    """Say how far a task is, in whatever it counts: what is equal twice came no further."""
    if stage == "train":  # by the names alone, since saepipe.checkpoints imports torch
        folders = [Path(point.run.dir) / "checkpoints" for point in grid.points(config)]
        return [
            max((int(path.stem.split("-")[1]) for path in folder.glob("step-*.ckpt")), default=0) for folder in folders
        ]
    if stage in ("tokenise", "cache"):
        return [sum(1 for _ in Path(config.store.dir).rglob("*.json"))]
    return []


def _run(words: list[str], environment: Mapping[str, str], log: Path) -> tuple[int, bool]:
    """Run a command until it ends, and pass signals on to it; what it prints goes to a file.

    Returns:
        Its exit code, and whether a signal came to this process that asks for an end.
    """
    came: list[int] = []
    with log.open("ab") as file:
        started = subprocess.Popen(
            words, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )

        def pass_on(number: int, _: object) -> None:
            came.append(number)
            # srun's tasks get from SLURM itself what concerns them; srun takes a second one as an order to kill.
            if words[0] != "srun" and started.poll() is None:
                started.send_signal(number)

        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGCONT"):
            signal.signal(getattr(signal, name), pass_on)
        return started.wait(), bool({signal.SIGTERM, signal.SIGINT} & set(came))
