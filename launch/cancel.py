"""Stop a submitted sweep for good: `python -m launch.cancel RUNS`. What is done stays; submitting again goes on."""

import argparse
import logging
from pathlib import Path

from launch import local, slurm
from launch.status import status
from launch.sweep_folder import FINAL, Outcome, SweepFolder
from saepipe import entry

log = logging.getLogger("saepipe.launch")


def cancel(run_dir: str | Path) -> int:
    """Cancel every task of the last submission that is not over.

    Args:
        run_dir: The sweep's folder.

    Returns:
        How many there were.
    """
    sweep = SweepFolder.newest(run_dir)
    left = [line for line in status(run_dir) if line.state not in FINAL]
    if sweep.about["executor"] == "slurm":
        slurm.cancel([line.job for line in left])
        for stage in sweep.stages:
            for index, task in enumerate(stage.tasks):
                if task.job_id in {line.job for line in left} and not sweep.starts(stage.name, index):
                    sweep.end(stage.name, index, Outcome("cancelled", "cancelled by launch.cancel"))
    else:
        local.cancel(sweep)
    log.info("cancelled %s of %s; the same launch.submit goes on from what is done", len(left), sweep.run_dir)
    return len(left)


def main() -> None:
    """Cancel a sweep named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.cancel", description=__doc__)
    parser.add_argument("runs", help="the sweep's folder (run.dir)")
    given = parser.parse_args()
    entry.prepare_process()
    with entry.polite_end():
        cancel(given.runs)


if __name__ == "__main__":
    main()
