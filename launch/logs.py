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

    Raises:
        UserError: There is no such task; the close matches are named.
    """
    sweep = SweepFolder.newest(run_dir)
    tasks = {
        f"{stage.name}-{index}": (stage.name, task.title, sweep.log_file(stage.name, index))
        for stage in sweep.stages
        for index, task in enumerate(stage.tasks)
    }
    found = [path for name, (stage, title, path) in tasks.items() if wanted in (None, name, stage, title)]
    if not found:
        raise unknown("task", wanted, dict.fromkeys([*tasks, *(title for _, title, _ in tasks.values())]))
    return [path for path in found if path.exists()]


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
            sys.stdout.write(f"==> {path}\n{path.read_text(errors='replace')}\n")
        sys.stdout.flush()
        if given.follow and paths:
            subprocess.run(["tail", "--lines=0", "--follow=name", *map(str, paths)], check=False)


if __name__ == "__main__":
    main()
