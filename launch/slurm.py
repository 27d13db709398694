"""What is asked of SLURM about jobs that there are: states, requeueing, cancelling."""

import logging
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence

from saepipe.errors import UserError

log = logging.getLogger("saepipe.launch")

_ANSWER_S = 120
_TRIES, _PAUSE_S = 10, 6.0  # a controller that restarts is away for less than a minute
OVER = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED")
"""What SLURM calls a job that is over."""
_LARGEST_ARRAY = 1001  # SLURM's default of MaxArraySize


def there() -> bool:
    """Tell whether this machine can submit jobs."""
    return shutil.which("sbatch") is not None


def largest_array() -> int:
    """Ask how many jobs an array may have."""
    found = re.search(r"MaxArraySize\s*=\s*(\d+)", call("scontrol", "show", "config").stdout)
    return int(found[1]) if found else _LARGEST_ARRAY


def state(job_id: str) -> str:
    """Ask for the state of the job that this process belongs to; empty where it is forgotten.

    SLURM says COMPLETING of every job that it ends. Here it is REQUEUED where the scheduler puts it back, TIMEOUT where
    its time is up, and CANCELLED where somebody ends it for good.
    """
    shown = call("scontrol", "--oneliner", "show", "job", job_id).stdout
    told = dict(word.split("=", 1) for word in shown.split() if "=" in word)
    word = told.get("JobState", "")
    if word != "COMPLETING":
        return word
    if int(told.get("Restarts", 0)) > int(os.environ.get("SLURM_RESTART_COUNT") or 0):
        return "REQUEUED"
    return "TIMEOUT" if told.get("Reason") == "TimeLimit" else "CANCELLED"


def patient_state(job_id: str) -> str:
    """Ask for the state of a job that there must be, again and again where the controller does not answer."""
    for _ in range(_TRIES):
        try:
            if found := state(job_id):
                return found
        except UserError as error:
            log.warning("%s", error)
        time.sleep(_PAUSE_S)
    return "RUNNING"  # as it was; requeueing will say so where it is not


def states(job_ids: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Ask for the states of jobs and the reasons that they wait for; those that nobody remembers are left out.

    Raises:
        UserError: The cluster does not answer.
    """
    wanted = list(job_ids)
    if not wanted:
        return {}
    arrays = ",".join(dict.fromkeys(job_id.split("_")[0] for job_id in wanted))
    found: dict[str, tuple[str, str]] = {}
    shown = call("squeue", "--noheader", "--array", "--states=all", f"--jobs={arrays}", "--format=%i|%A|%T|%r")
    for line in shown.stdout.splitlines():
        name, number, word, reason = line.split("|", 3)
        found |= {name: (word, reason), number: (word, reason)}
    if any(job_id not in found for job_id in wanted):
        if shown.returncode and "Invalid job id" not in shown.stderr:  # which it says of those that it has forgotten
            raise UserError(f"the cluster does not tell of its jobs: {words(shown.stderr)}; try again")
        shown = call("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={arrays}", "--format=JobID,State")
        for line in shown.stdout.splitlines():
            name, word = line.split("|", 1)
            found.setdefault(name, (word.split()[0], ""))
    return {job_id: found[job_id] for job_id in wanted if job_id in found}


def requeue(job_id: str) -> None:
    """Put a running job back into the queue; the scheduler ends it where it is.

    Raises:
        UserError: It would not, however often it was asked.
    """
    for number in range(_TRIES):
        done = call("scontrol", "requeue", job_id)
        if done.returncode == 0:
            return
        log.warning("job %s was not requeued (try %s): %s", job_id, number + 1, words(done.stderr))
        time.sleep(_PAUSE_S)
    raise UserError(f"job {job_id} cannot be requeued: {words(done.stderr)}")


def queued(job_ids: Iterable[str]) -> set[str]:
    """Return those of some jobs that wait or run."""
    return {job_id for job_id, (word, _) in states(job_ids).items() if word not in OVER}


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs, those that run and those that wait."""
    if job_ids:
        done = call("scancel", *job_ids)
        if done.returncode:
            raise UserError(f"scancel refused: {words(done.stderr)}")


def call(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run one of SLURM's commands.

    Raises:
        UserError: It did not answer.
    """
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_S)
    except FileNotFoundError:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    except subprocess.TimeoutExpired:
        raise UserError(f"the cluster did not answer {command[0]} within {_ANSWER_S} s; try again") from None


def words(text: str) -> str:
    """Return what a command of SLURM complains about."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [re.sub(r"^(sbatch|scontrol|scancel): (error: )?", "", line) for line in lines if "error" in line.lower()]
    return "; ".join(dict.fromkeys(told or lines[-1:])) or "no reason given"
