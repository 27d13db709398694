"""Stop a submitted sweep for good: `python -m launch.cancel RUNS`. What is done stays; submitting again goes on.

`python -m launch.cancel RUNS TASK` stops one point, or stage, and with it what waits for that.
"""

import argparse
import logging
from pathlib import Path

from launch import local, slurm
from launch.sweep_folder import FINAL, Outcome, SweepFolder
from saepipe import entry
from saepipe.errors import UserError, unknown

log = logging.getLogger("saepipe.launch")


def cancel(run_dir: str | Path, wanted: str | None = None) -> int:
    """Cancel every task of the last submission that is not over.

    Args:
        run_dir: The sweep's folder.
        wanted: Only a task (a point's name, or stage-number such as train-0) or stage; what waits for it ends as well.

    Returns:
        How many there were.

    Raises:
        UserError: There is no such task, or it cannot be stopped alone.
    """
    sweep = SweepFolder.newest(run_dir)
    if not (found := sweep.find(wanted)):
        raise unknown("task", wanted, sweep.names())
    if wanted is not None and sweep.about["executor"] == "local":
        raise UserError(
            f"{wanted} cannot be cancelled alone on this machine, where one process runs all; leave it out, and submit "
            "what is to go on again"
        )
    left = [task for task in found if (end := sweep.outcome(*task)) is None or end.state not in FINAL]
    on_cluster = sweep.about["executor"] == "slurm"
    if on_cluster:  # a job that is over without a word keeps the scheduler's
        jobs = {task: job for task in left if (job := sweep.stage(task[0]).tasks[task[1]].job_id)}
        queued = slurm.queued(jobs.values())
        left = [task for task, job in jobs.items() if job in queued]
    for task in left:  # first, so that nothing that begins meanwhile goes on
        sweep.cancel(*task)
    if on_cluster:
        slurm.cancel([jobs[task] for task in left])
    else:
        local.cancel(sweep, left)
    for task in left:  # of what runs, its own process says so when it has ended
        if not sweep.starts(*task) or sweep.outcome(*task) is not None:
            sweep.end(*task, Outcome.on_request())
    log.info("cancelled %s of %s; the same launch.submit goes on from what is done", len(left), sweep.run_dir)
    return len(left)


def main() -> None:
    """Cancel a sweep named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.cancel", description=__doc__)
    parser.add_argument("runs", help="the sweep's folder (run.dir)")
    parser.add_argument("task", nargs="?", help="a point's name, a stage, or one of its tasks such as train-0")
    given = parser.parse_args()
    entry.prepare_process()
    with entry.polite_end():
        cancel(given.runs, given.task)


if __name__ == "__main__":
    main()
