"""How a submitted sweep is doing: `python -m launch.status RUNS` tells each task's state, step, pace and words."""

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch import local, slurm
from launch.sweep_folder import FINAL, Stage, SweepFolder
from saepipe import entry
from saepipe.cluster import STAGES
from saepipe.runs import Run


@dataclass
class Line:
    """What is known of a task."""

    stage: str
    title: str
    job: str
    state: str
    """waiting, running, done, failed, cancelled or requeued."""
    why: str
    """The reason, where there is one."""
    restarts: int
    step: str = ""
    tokens_per_s: str = ""
    left: str = ""
    """Time left, as its last logged row says."""
    last: str = ""
    """Last line of its log."""


def status(run_dir: str | Path) -> list[Line]:
    """Look at every task of the last submission, and at what earlier ones did that it had not to do again.

    Args:
        run_dir: The sweep's folder.

    Raises:
        UserError: Nothing was submitted from there, or the cluster does not answer.
    """
    newest, *earlier = SweepFolder.all(run_dir)
    stages = newest.stages
    on_cluster = newest.about["executor"] == "slurm"
    ids = [task.job_id for stage in stages for task in stage.tasks if task.job_id]
    known = slurm.states(ids) if on_cluster else {}
    lines = _lines(newest, known)
    for sweep in earlier:
        there = {(line.stage, line.title) for line in lines}
        done = [line for line in _lines(sweep, {}) if line.state == "done"]
        lines = [line for line in done if (line.stage, line.title) not in there] + lines
    return sorted(lines, key=lambda line: STAGES.index(line.stage))


def alive(sweep: SweepFolder) -> int:
    """Count the tasks of a submission that may still do something."""
    lines = status(sweep.run_dir)
    return sum(line.state not in FINAL for line in lines)


def _lines(sweep: SweepFolder, known: dict[str, tuple[str, str]]) -> list[Line]:
    return [_line(sweep, stage, index, known) for stage in sweep.stages for index, _ in enumerate(stage.tasks)]


def _line(sweep: SweepFolder, stage: Stage, index: int, known: dict[str, tuple[str, str]]) -> Line:
    task, starts, outcome = stage.tasks[index], sweep.starts(stage.name, index), sweep.outcome(stage.name, index)
    state, why = ("waiting", "") if not starts else ("running", f"on {starts[-1]['nodes']}")
    if outcome is not None:
        state, why = outcome.state, outcome.why
    if state not in FINAL:
        if task.job_id is not None:
            state, why = _of_cluster(sweep, stage, index, known.get(task.job_id), state, why)
        elif not local.runner_alive(sweep):
            state, why = "failed", "the process that runs the stages is gone; submit the sweep again"
    line = Line(stage.name, task.title, task.job_id or "", state, why, max(0, len(starts) - 1))
    line.last = sweep.last_words(stage.name, index)
    if stage.name == "train":
        _add_progress(line, task.run_dir, sweep.config(stage.name, index).train.tokens)
    return line


def _of_cluster(
    sweep: SweepFolder, stage: Stage, index: int, told: tuple[str, str] | None, state: str, why: str
) -> tuple[str, str]:
    """Return state and reason of a task that is not over, by what the scheduler says of its job."""
    if told is None:
        return "failed", "the scheduler has forgotten its job, which left no word"
    word, reason = told
    if word == "PENDING":
        if sweep.starts(stage.name, index):
            return "requeued", why if state == "requeued" else reason
        return "waiting", f"for {stage.after}" if reason == "Dependency" else reason
    if word.startswith("CANCELLED"):
        never = reason in ("DependencyNeverSatisfied", "Dependency") or not sweep.starts(stage.name, index)
        return "cancelled", f"{stage.after} did not end well" if never and stage.after else "it was cancelled"
    if word in ("REQUEUED", "PREEMPTED", "REQUEUE_HOLD"):
        return "requeued", word.lower()
    if word in slurm.OVER:
        return "failed", _script_words(sweep, stage, index) or f"its job ended as {word}"
    return "running", why or word.lower()  # RUNNING and what comes with it: CONFIGURING, SIGNALING, COMPLETING


def _script_words(sweep: SweepFolder, stage: Stage, index: int) -> str:
    """Return the last line of a job's own log: what its shell or Python said before the task began."""
    for path in sweep.script_logs(stage.name, index):
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines if not line.startswith("submitit INFO")]
        if lines:
            return lines[-1]
    return ""


def _add_progress(line: Line, run_dir: str, tokens: int) -> None:
    """Add what the last row of metrics says, of a grid that of its first point."""
    files = [Path(run_dir) / "metrics.csv", *sorted(Path(run_dir).glob("*/metrics.csv"))]
    path = next((path for path in files if path.exists()), None)
    if path is None:
        return
    with path.open(newline="", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdecimal() and None not in row.values()]
    if not rows:
        return
    summary = Run(path.parent).summary()
    row = rows[-1]
    samples = float(row.get("details/n_training_samples") or 0)
    total = int(int(row["step"]) * tokens / samples) if samples else 0
    line.step = f"{int(row['step']):,} of {total:,}"
    if rate := row.get("details/tokens_per_s"):
        line.tokens_per_s = f"{float(rate):,.0f}"
    if not summary and (seconds := row.get("details/seconds_left")):
        line.left = _duration(float(seconds))


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d} h"
        if minutes >= 60
        else f"{minutes} min"
        if minutes
        else f"{seconds:.0f} s"
    )


def table(lines: Sequence[Line]) -> str:
    """Lay lines out for the terminal; below, why what failed failed."""
    head = ("stage", "task", "job", "state", "step", "tokens/s", "left", "restarts", "last")
    rows = [head]
    for line in lines:
        restarts = str(line.restarts) if line.restarts else ""
        shown = line.last if line.state == "running" else line.why if line.state in ("waiting", "requeued") else ""
        rows.append(
            (
                line.stage,
                line.title,
                line.job,
                line.state,
                line.step,
                line.tokens_per_s,
                line.left,
                restarts,
                shown[:80],
            )
        )
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    ended = [line for line in lines if line.state in ("failed", "cancelled")]
    text += [f"{line.stage} {line.title} {line.state}: {line.why or 'no word was left'}" for line in ended]
    return "\n".join(text)


def main() -> None:
    """Show the state of a sweep."""
    parser = argparse.ArgumentParser(prog="python -m launch.status", description=__doc__)
    parser.add_argument("runs", help="the sweep's folder (run.dir)")
    parser.add_argument(
        "--watch",
        action="store_true",
        help="again every 10 seconds, until nothing moves any more; the exit code is 1 if not all is done",
    )
    parser.add_argument("--json", action="store_true", help="a JSON list, for programs")
    given = parser.parse_args()
    entry.prepare_process()
    with entry.polite_end():
        while True:
            lines = status(given.runs)
            text = json.dumps([vars(line) for line in lines], indent=1) if given.json else table(lines)
            sys.stdout.write(text + "\n")
            if not given.watch:
                return
            if all(line.state in FINAL for line in lines):
                sys.exit(int(any(line.state != "done" for line in lines)))
            sys.stdout.flush()
            time.sleep(10)


if __name__ == "__main__":
    main()
