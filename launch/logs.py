"""What a submitted sweep's jobs printed: `python -m launch.logs RUNS [TASK]`, of a task over all of its starts."""

import argparse
import subprocess
import sys
from pathlib import Path

from launch.sweep_folder import SweepFolder
from saepipe import entry
from saepipe.errors import unknown


def find(run_dir: str | Path, wanted: str | None) -> list[Path]:
    """Find the logs of a sweep.

    Args:
        run_dir: The sweep's folder.
        wanted: Only of this task (a point's name, or stage-number such as train-0) or stage; None is all.

    Returns:
        Of each task what its batch script printed, on a cluster, and its own log, which may not be there yet.

    Raises:
        UserError: There is no such task; the close matches are named.
    """
    sweeps = SweepFolder.all(run_dir)
    for sweep in sweeps:  # what an earlier submission did is not in the last one
        if found := sweep.find(wanted):
            return [path for task in found for path in (*sweep.script_logs(*task), sweep.log_file(*task))]
    raise unknown("task", wanted, sweeps[0].names())


def main() -> None:
    """Print logs named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m launch.logs", description=__doc__)
    parser.add_argument("runs", help="the sweep's folder (run.dir)")
    parser.add_argument("task", nargs="?", help="a point's name, a stage, or one of its tasks such as train-0")
    parser.add_argument("--follow", action="store_true", help="go on with what is printed from now on")
    given = parser.parse_args()
    entry.prepare_process()
    with entry.polite_end():
        paths = find(given.runs, given.task)
        for path in paths:
            text = path.read_text(errors="replace") if path.exists() else "nothing yet: it has not begun"
            sys.stdout.write(f"==> {path}\n{text}\n")
        sys.stdout.flush()
        if given.follow:
            subprocess.run(["tail", "--lines=0", "--follow=name", "--retry", *map(str, paths)], check=False)


if __name__ == "__main__":
    main()
