"""A sweep's stages on this machine, one after the other: the process that `slurm=local` leaves behind."""

import os
import signal
import sys
import time
from pathlib import Path

from submitit.local.local import LocalExecutor, LocalJob

from launch.supervise import supervise
from launch.sweep_folder import Outcome, Stage, SweepFolder
from saepipe import durable

_FOR_EVER_MIN = 10 * 365 * 24 * 60
_LOOK_S = 0.5


def run(sweep: SweepFolder) -> None:
    """Run every stage after the other.

    Args:
        sweep: The submission.
    """
    durable.write_text(sweep.folder / "runner.pid", str(os.getpid()))
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


def cancel(sweep: SweepFolder) -> None:
    """End the runner and what it runs, and mark what is left as cancelled."""
    pids = [int((sweep.folder / "runner.pid").read_text())] if (sweep.folder / "runner.pid").exists() else []
    left = [(stage.name, index) for stage in sweep.stages for index, _ in enumerate(stage.tasks)]
    left = [(stage, index) for stage, index in left if sweep.outcome(stage, index) is None]
    for pid in pids:
        _end(pid, signal.SIGKILL)  # first, so that it starts nothing new
    for stage, index in left:
        for start in sweep.starts(stage, index)[-1:]:
            _end(int(start["pid"]), signal.SIGTERM)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(_runs(sweep, stage, index) for stage, index in left):
        time.sleep(_LOOK_S)
    for stage, index in left:
        if sweep.outcome(stage, index) is None or not sweep.starts(stage, index):
            sweep.end(stage, index, Outcome("cancelled", "cancelled by launch.cancel"))


def _runs(sweep: SweepFolder, stage: str, index: int) -> bool:
    starts = sweep.starts(stage, index)
    return bool(starts) and sweep.outcome(stage, index) is None and is_alive(int(starts[-1]["pid"]))


def is_alive(pid: int) -> bool:
    """Tell whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
        stat = Path(f"/proc/{pid}/stat")  # where there is none, what can be signalled is alive
        return not Path("/proc/self").exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def runner_alive(sweep: SweepFolder) -> bool:
    """Tell whether the process that runs the stages is there."""
    file = sweep.folder / "runner.pid"
    return file.exists() and is_alive(int(file.read_text()))


def _end(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def main() -> None:
    """Run a submission named on the command line."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    run(SweepFolder(sys.argv[1]))


if __name__ == "__main__":
    main()
