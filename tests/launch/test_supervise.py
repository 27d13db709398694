"""What the end of a job's processes means, and how they are started."""

import json
import time
from pathlib import Path

import pytest

from launch import supervise
from launch.sweep_folder import Outcome, Stage, SweepFolder, Task
from saepipe import entry
from saepipe.cluster import SlurmConfig

PROFILE_MIN = 240


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    made = SweepFolder(tmp_path / "runs" / "x" / "launch" / "1")
    overrides = ["+experiment=demo", f"run.dir={tmp_path}/runs/x", "trainer.devices=2", "trainer.num_nodes=3"]
    overrides += ["slurm.executor=slurm", "slurm.cpus_per_rank=4", "slurm.srun_args=['--mpi=none']"]
    config = entry.load_config("launch", overrides)
    entry.save_config(config, made.config_file("train", 0))
    entry.save_config(config, made.config_file("cache", 0))
    made.write([Stage("cache", [Task("store", "x")]), Stage("train", [Task("x", str(tmp_path / "runs" / "x"))])])
    return made


def begin(sweep: SweepFolder, marks: list[int]) -> None:
    sweep.begin("train", 0, progress=marks, tries=supervise.tries(sweep, "train", 0, marks))


def judged(sweep: SweepFolder, code: int, state: str = "RUNNING") -> Outcome:
    return supervise.judge(code, state, sweep, "train", 0)


@pytest.mark.parametrize(
    ("code", "state", "expected"),
    [
        (0, "RUNNING", "done"),
        (0, "COMPLETING", "done"),  # it was just in time
        (140, "RUNNING", "requeued"),  # USR2, before a time limit
        (143, "RUNNING", "requeued"),
        (137, "RUNNING", "requeued"),
        (-9, "RUNNING", "requeued"),
        (143, "REQUEUED", "requeued"),  # by somebody's scontrol, a lost node or a preemption without a word
        (143, "CANCELLED", "cancelled"),
        (143, "PREEMPTED", "requeued"),  # the scheduler does it
        (140, "SIGNALING", "requeued"),  # as a job is called while it is told
        (143, "TIMEOUT", "requeued"),  # it did not save in time, and goes on from where it last did
        (1, "TIMEOUT", "requeued"),
        (2, "RUNNING", "failed"),
        (1, "RUNNING", "failed"),
        (139, "RUNNING", "failed"),  # SIGSEGV would come again
    ],
)
def test_only_what_was_stopped_is_requeued(sweep: SweepFolder, code: int, state: str, expected: str) -> None:
    begin(sweep, [0])
    assert judged(sweep, code, state).state == expected


def test_a_task_that_comes_no_further_is_given_up(sweep: SweepFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sweep.run_dir / "checkpoints"
    folder.mkdir(parents=True)
    for start in range(supervise.FRUITLESS + 2):
        (folder / f"step-{start + 1:09d}.ckpt").touch()
        begin(sweep, [start])
        end = judged(sweep, 137)
        assert end.state == "requeued"  # each start came further
        sweep.end("train", 0, end)
    ends, now = [], time.time
    # A preemption in its first seconds says nothing of the task; a kill does, and its time limit (USR2, late).
    for code, late in ((137, False), (140, False), (143, False), (140, True), (140, False), (137, False)):
        begin(sweep, [supervise.FRUITLESS + 2])
        if late:
            monkeypatch.setattr(time, "time", lambda: now() + 60 * PROFILE_MIN - 150)
        ends.append(judged(sweep, code))
        monkeypatch.undo()
        sweep.end("train", 0, ends[-1])
    assert [end.interrupted for end in ends] == [False, True, True, False, True, False]
    assert [end.state for end in ends] == ["requeued"] * 5 + ["failed"]
    assert (
        f"3 times in a row without a step forward; where that was the time limit, raise slurm.time_min={PROFILE_MIN}"
        in (ends[-1].why)
    )


def test_a_failure_is_told_in_the_tasks_own_words(sweep: SweepFolder) -> None:
    begin(sweep, [0])
    sweep.log_file("train", 0).write_text(
        "reading\ntrain: 0%\rtrain: 3%\nsaepipe: sae.k=0 is out of range\nsrun: error: node p1: task 0: Exited\n"
    )
    assert (judged(sweep, 2).state, judged(sweep, 2).why) == ("failed", "sae.k=0 is out of range")
    sweep.log_file("train", 0).write_text("ImportError: no torch\nslurmstepd: error: *** STEP CANCELLED ***\n")
    assert judged(sweep, 1).why == "ImportError: no torch"


def test_in_a_job_srun_starts_as_many_ranks_as_there_are_nodes_for(sweep: SweepFolder) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3"}
    words = supervise.command(sweep, "train", 0, job)
    assert words[0] == "srun"
    assert {"--nodes=3", "--ntasks=6", "--ntasks-per-node=2", "--cpus-per-task=4", "--mpi=none"} <= set(words)
    assert words[-3:] == [str(sweep.folder), "train", "0"]
    fewer = supervise.command(sweep, "train", 0, job | {"SLURM_JOB_NUM_NODES": "2"})
    assert "--ntasks=4" in fewer
    odd = supervise.command(sweep, "train", 0, job | {"SLURM_JOB_NUM_NODES": "5"})
    assert "--ntasks=8" in odd  # 24 lanes are not for 10 ranks
    assert "--ntasks=1" in supervise.command(sweep, "cache", 0, job)


def test_on_this_machine_it_starts_the_work_itself_within_an_allocation_too(sweep: SweepFolder) -> None:
    entry.save_config(entry.load_config("launch", ["+experiment=demo"]), sweep.config_file("train", 0))
    assert supervise.command(sweep, "train", 0, {"SLURM_JOB_ID": "7"})[1:4] == ["-u", "-m", "launch.work"]


def test_a_task_that_was_cancelled_begins_no_more(sweep: SweepFolder) -> None:
    sweep.cancel("train", 0)
    with pytest.raises(SystemExit):
        supervise.supervise(str(sweep.folder), "train", 0)
    assert (sweep.outcome("train", 0).state, len(sweep.starts("train", 0))) == ("cancelled", 1)  # type: ignore[union-attr]
    assert judged(sweep, 143, "REQUEUED").state == "cancelled"
    assert not sweep.log_file("train", 0).read_text().count("training")


def test_a_profiles_own_pythonpath_comes_behind_the_frozen_code() -> None:
    profile = SlurmConfig(environment={"PYTHONPATH": "/mine", "THREADS": 4})
    assert supervise.own_environment(profile, {"PYTHONPATH": "/frozen"}) == {
        "PYTHONPATH": "/frozen:/mine",
        "THREADS": "4",
    }


def test_a_new_start_forgets_the_last_outcome(sweep: SweepFolder) -> None:
    sweep.begin("train", 0, nodes="p1", progress=[0])
    sweep.end("train", 0, Outcome("requeued", "ended by SIGUSR2"))
    assert sweep.outcome("train", 0).state == "requeued"  # type: ignore[union-attr]
    sweep.begin("train", 0, nodes="p2", progress=[5])
    assert sweep.outcome("train", 0) is None
    assert [start["nodes"] for start in sweep.starts("train", 0)] == ["p1", "p2"]
    assert json.loads((sweep.task_folder("train", 0) / "starts.jsonl").read_text().splitlines()[1])["progress"] == [5]
