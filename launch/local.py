"""A sweep's stages on this machine, one after the other: the process that `slurm=local` leaves behind."""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from submitit.local.local import LocalExecutor, LocalJob

from launch import process
from launch.supervise import supervise
from launch.sweep_folder import Outcome, Stage, SweepFolder

_FOR_EVER_MIN = 10 * 365 * 24 * 60
_LOOK_S = 0.5
_END_S = 30.0
RUNNER = "runner"
"""File of a submission that names the process which runs its stages."""


def run(sweep: SweepFolder) -> None:
    """Run every stage after the other.

    Args:
        sweep: The submission.
    """
    for stage in sweep.stages:
        _run_stage(sweep, stage)


def _run_stage(sweep: SweepFolder, stage: Stage) -> None:
    """Run a stage's tasks, a few at a time, as far as what they wait for is done."""
    at_once = sweep.config(stage.name, 0).slurm.of(stage.name).array_parallelism or 1
    running: dict[int, LocalJob[str]] = {}
    for index, _ in enumerate(stage.tasks):
        if why := missing(sweep, stage, index):
            sweep.end(stage.name, index, Outcome("cancelled", why))
            continue
        while len(running) >= at_once:
            _forget_ended(sweep, stage, running)
            time.sleep(_LOOK_S)
        executor = LocalExecutor(sweep.logs / stage.name)
        executor.update_parameters(timeout_min=_FOR_EVER_MIN, stderr_to_stdout=True, gpus_per_node=_gpus())
        running[index] = executor.submit(supervise, str(sweep.folder), stage.name, index)  # type: ignore[assignment]
    while running:
        _forget_ended(sweep, stage, running)
        time.sleep(_LOOK_S)


def missing(sweep: SweepFolder, stage: Stage, index: int) -> str | None:
    """Name what a task waits for in vain; None where it may begin."""
    if stage.after is None or stage.anyhow:
        return None
    numbers = [index] if stage.each else range(len(sweep.stage(stage.after).tasks))
    for number in numbers:
        end = sweep.outcome(stage.after, number)
        if end is None or end.state != "done":
            return f"{stage.after} did not end well: {end.why if end else 'it never began'}"
    return None


def _forget_ended(sweep: SweepFolder, stage: Stage, running: dict[int, "LocalJob[str]"]) -> None:
    for index in [index for index, job in running.items() if job.done()]:
        job = running.pop(index)
        if sweep.outcome(stage.name, index) is None:
            words = Path(job.paths.stdout).read_text(errors="replace").strip().splitlines()
            sweep.end(stage.name, index, Outcome("failed", words[-1] if words else "its process ended without a word"))


def _gpus() -> int:
    """How many GPUs this machine has; submitit hides the others."""
    import torch

    return torch.cuda.device_count()


def cancel(sweep: SweepFolder, tasks: Sequence[tuple[str, int]]) -> None:
    """End the runner, and tasks that were marked as cancelled; returns when they have ended, or do not.

    Raises:
        UserError: They run on another machine.
    """
    if (sweep.folder / RUNNER).exists():
        process.end((sweep.folder / RUNNER).read_text(), signal.SIGKILL)  # first, so that it starts nothing new
    running = [start["process"] for task in tasks for start in sweep.starts(*task)[-1:]]
    for each in running:
        process.end(each, signal.SIGTERM)
    deadline = time.monotonic() + _END_S
    while time.monotonic() < deadline and any(map(process.is_alive, running)):
        time.sleep(_LOOK_S)


def runner_alive(sweep: SweepFolder) -> bool:
    """Tell whether the process that runs the stages is there."""
    file = sweep.folder / RUNNER
    return file.exists() and process.is_alive(file.read_text())


def main() -> None:
    """Run a submission named on the command line."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run(SweepFolder(sys.argv[1]))


if __name__ == "__main__":
    main()
