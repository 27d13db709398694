"""What torchrun's and srun's environments say of a rank, and what is refused."""

import logging
import os
import socket
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch.distributed as dist

from saepipe import progress
from saepipe.config import TrainerConfig
from saepipe.errors import UserError
from saepipe.launched import Launch, first_host
from saepipe.ranks import Ranks

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n1",
    "MASTER_PORT": "29500",
    "GROUP_RANK": "1",
}
SBATCH = {  # of the batch script itself: it is no step, whatever the job's tasks
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "6",
    "SLURM_NNODES": "3",
    "SLURM_TASKS_PER_NODE": "2(x3)",
    "SLURM_JOB_NODELIST": "gpu[03-05]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
}
SRUN = SBATCH | {
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "gpu[03-05]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_nobody_else_started_this_process() -> None:
    for environment in ({}, SBATCH, SBATCH | {"MASTER_ADDR": "n1", "MASTER_PORT": "1"}):
        assert Launch.here(environment) is None
    assert Launch.here() is None  # the tests' own environment
    assert Launch.alone().ranks == Ranks(0, 1)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_an_environment_of_torchrun_is_none(missing: str) -> None:
    assert Launch.here({key: value for key, value in TORCHRUN.items() if key != missing}) is None


def test_torchrun_says_all_there_is_to_know() -> None:
    assert Launch.here(TORCHRUN) == Launch(Ranks(5, 8), 1, 4, "n1", 29500)
    assert Launch.here(SRUN | TORCHRUN) == Launch.here(TORCHRUN)  # torchrun under srun
    one = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert Launch.here(one) == Launch(Ranks(0, 1), 0, 1, "n1", 29500)


def test_a_step_of_one_task_is_a_process_by_itself() -> None:
    assert Launch.here(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}) is None


@pytest.mark.parametrize(
    ("tasks", "each", "world"),
    [("6", 6, 6), ("2(x3)", 2, 6), ("3,3", 3, 6), ("2(x2),2", 2, 6), ("12(x16)", 12, 192), ("1(x6)", 1, 6)],
)
def test_srun_says_how_many_ranks_each_machine_has(tasks: str, each: int, world: int) -> None:
    found = Launch.here(SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_STEP_NUM_TASKS": str(world)})
    assert found is not None
    assert (found.ranks, found.local_rank, found.local_world_size) == (Ranks(3, world), 1, each)
    assert found.address == "gpu03"


@pytest.mark.parametrize(
    "broken", [TORCHRUN | {"RANK": "x"}, TORCHRUN | {"MASTER_PORT": ""}, {"SLURM_STEP_NUM_TASKS": "2"}]
)
def test_an_environment_that_makes_no_sense_is_refused(broken: dict[str, str]) -> None:
    with pytest.raises(UserError, match="does not say which rank this is"):
        Launch.here(broken)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_in_vain_for_the_others_says_so(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saepipe.launched._MEETING", timedelta(seconds=1))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match=rf"rank {rank} did not meet all of the 2 ranks at .*MASTER_PORT={port}"):
        Launch(Ranks(rank, 2), rank, 2, "127.0.0.1", port).join()
    assert not dist.is_initialized()


@pytest.mark.parametrize("tasks", ["2,1", "2(x2),1", "3,2(x2)", "1,2(x2),1"])
def test_machines_with_different_numbers_of_ranks_are_refused(tasks: str) -> None:
    with pytest.raises(UserError) as raised:
        Launch.here(SRUN | {"SLURM_STEP_TASKS_PER_NODE": tasks})
    assert f"SLURM_STEP_TASKS_PER_NODE={tasks}, not the same on every node; set --ntasks-per-node" in str(raised.value)


def test_an_address_and_a_port_may_be_given_to_srun() -> None:
    found = Launch.here(SRUN | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"})
    assert found is not None
    assert (found.address, found.port) == ("10.0.0.7", 1234)


def test_ports_differ_between_steps_and_jobs_and_agree_between_ranks() -> None:
    def port(**changes: str) -> int:
        found = Launch.here(SRUN | changes)
        assert found is not None
        return found.port

    jobs = [[port(SLURM_JOB_ID=str(job), SLURM_STEP_ID=str(step)) for step in range(5)] for job in range(4711, 4731)]
    assert len({each for steps in jobs for each in steps}) == 100
    assert port(SLURM_PROCID="0", SLURM_LOCALID="0") == port(SLURM_PROCID="5", SLURM_LOCALID="1")
    for job in ("1", "99999999", "4294967295"):
        assert 1024 < port(SLURM_JOB_ID=job) < 32768  # below what Linux gives out by itself


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("a[03-07,9],b1", "a03"),
        ("a[9,03-07]", "a9"),
        ("node-a-[001-128]", "node-a-001"),
        ("rack1-n[1-2],rack2-n[1-2]", "rack1-n1"),
        ("b1,a[03-07]", "b1"),
        ("gpu[01-04]-ib,gpu9", "gpu01-ib"),
        ("r[1-2]n[3-4]", "r1n3"),
        ("n1.cluster.org,n2.cluster.org", "n1.cluster.org"),
    ],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


@pytest.mark.parametrize(("devices", "nodes", "fits"), [(2, 3, True), (3, 2, False), (2, 1, False), (1, 1, False)])
def test_typed_numbers_must_be_those_of_what_was_started(devices: int, nodes: int, fits: bool) -> None:
    launch, trainer = Launch.here(SRUN), TrainerConfig(devices=devices, num_nodes=nodes)
    assert launch is not None
    launch.check(trainer, typed=False)
    if fits:
        launch.check(trainer, typed=True)
        return
    words = (
        rf"trainer\.devices={devices} and trainer\.num_nodes={nodes} differ .*: 2 ranks on each of 3 machines; leave"
    )
    with pytest.raises(UserError, match=words):
        launch.check(trainer, typed=True)


@pytest.fixture
def loud() -> Iterator[logging.Logger]:
    logger = logging.getLogger("saepipe")
    level = logger.level
    logger.setLevel(logging.INFO)
    yield logger
    logger.setLevel(level)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_alone_has_something_to_say(
    rank: int, loud: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden: list[bool] = []
    monkeypatch.setattr(progress, "hide", lambda: hidden.append(True))
    Launch(Ranks(rank, 2), rank, 2, "n1", 1).quieten()
    assert hidden == [True] * rank
    assert [loud.isEnabledFor(level) for level in (logging.WARNING, logging.ERROR)] == [not rank, True]


def test_a_process_by_itself_meets_nobody() -> None:
    Launch.alone().join()
    assert not dist.is_initialized()
