"""What a stage's jobs ask for, and what they wait for."""

from pathlib import Path
from typing import Any

import pytest

from launch import batch
from launch.sweep_folder import Stage, SweepFolder, Task
from saepipe.cluster import SlurmConfig

PROFILE = SlurmConfig(
    executor="slurm",
    partition="gpu",
    account="lab",
    gres="gpu:a100",
    cpus_per_rank=8,
    mem_gb=1.5,
    time_min=90,
    signal_delay_s=60,
    array_parallelism=2,
    setup=["module load cuda"],
    environment={"NCCL_DEBUG": "it's"},
    sbatch_args={"reservation": "mine"},
    stages={"collect": {"gres": None, "partition": "cpu"}},
)


@pytest.fixture
def sweep(tmp_path: Path) -> SweepFolder:
    return SweepFolder(tmp_path / "runs" / "x" / "launch" / "1")


def lines_of(sweep: SweepFolder, stage: Stage, profile: SlurmConfig = PROFILE) -> set[str]:
    before = Stage("cache", [Task("x", "x")]) if stage.after else None
    return set(batch.script(sweep, stage, profile.of(stage.name), before).splitlines())


def test_a_script_asks_for_what_the_profile_and_the_stage_say(sweep: SweepFolder) -> None:
    stage = Stage("train", [Task("a", "a"), Task("b", "b"), Task("c", "c")], 2, 4, 4, after="cache")
    found = lines_of(sweep, stage)
    options = "partition=gpu account=lab gres=gpu:a100:4 nodes=2 ntasks-per-node=4 cpus-per-task=8 mem=6G time=90 "
    options += "signal=USR2@60 array=0-2%2 job-name=x-train reservation=mine kill-on-invalid-dep=yes open-mode=append "
    options += "dependency='afterok:<cache>'"
    for option in options.split():
        assert f"#SBATCH --{option}" in found
    assert "#SBATCH --requeue" in found
    text = batch.script(sweep, stage, PROFILE, None)
    parts = ("module load cuda", "NCCL_DEBUG='it'\"'\"'s'", "PYTHONPATH=", "submitit.core")
    order = [text.index(part) for part in parts]
    assert order == sorted(order)
    assert f"export PYTHONPATH={sweep.code}${{PYTHONPATH:+:$PYTHONPATH}}" in found
    assert "export PYTHONSAFEPATH=1" in found


def test_a_stage_has_keys_of_its_own_and_only_gpus_that_it_uses(sweep: SweepFolder) -> None:
    found = lines_of(sweep, Stage("collect", [Task("sweep", "x")]))
    assert "#SBATCH --partition=cpu" in found
    assert not any("gres" in line or "array" in line or "dependency" in line for line in found)
    assert not any("gres" in line for line in lines_of(sweep, Stage("tokenise", [Task("store", "x")])))


def test_fewer_nodes_may_be_asked_for(sweep: SweepFolder) -> None:
    profile = SlurmConfig(executor="slurm", min_nodes=1, cpus_per_rank=3)
    found = lines_of(sweep, Stage("train", [Task("a", "a")], nodes=4, ranks_per_node=2), profile)
    assert {"#SBATCH --nodes=1-4", "#SBATCH --cpus-per-task=6"} <= found
    assert not any("--ntasks" in line for line in found)
    assert "#SBATCH --nodes=1" in lines_of(sweep, Stage("evaluate", [Task("a", "a")]), profile)


def arrays(name: str, ids: list[str], **more: Any) -> Stage:
    return Stage(name, [Task(str(at), "x", job_id) for at, job_id in enumerate(ids)], **more)


def test_jobs_wait_for_all_of_a_stage_or_for_their_own_number() -> None:
    train = arrays("train", ["7_0", "7_1", "8_0"])
    assert batch.dependency(arrays("cache", []), None, range(1)) is None
    assert batch.dependency(arrays("evaluate", []), train, range(3)) == "afterok:7:8"
    assert batch.dependency(arrays("collect", [], anyhow=True), train, range(1)) == "afterany:7:8"
    each = arrays("evaluate", [], each=True)
    assert batch.dependency(each, train, range(2)) == "aftercorr:7"
    assert batch.dependency(each, train, range(2, 3)) == "aftercorr:8"
    assert batch.dependency(each, arrays("train", ["9"]), range(1)) == "afterok:9"


@pytest.mark.parametrize(
    ("count", "size", "at_once", "expected"),
    [
        (3, 4, None, [(range(3), None, None)]),
        (3, 4, 2, [(range(3), 2, None)]),
        (5, 4, None, [(range(2), None, None), (range(2, 5), None, None)]),
        (5, 4, 3, [(range(2), 2, None), (range(2, 5), 1, None)]),
        (9, 4, 2, [(range(3), 1, None), (range(3, 6), 1, None), (range(6, 9), 1, 0)]),
        (9, 4, 1, [(range(3), 1, None), (range(3, 6), 1, 0), (range(6, 9), 1, 1)]),
    ],
)
def test_arrays_that_the_cluster_takes_keep_to_the_throttle_together(
    count: int, size: int, at_once: int | None, expected: list[tuple[range, int | None, int | None]]
) -> None:
    assert batch.parts(count, size, at_once) == [batch.Part(*each) for each in expected]
