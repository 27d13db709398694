"""How this process was started: alone, or as one of the ranks that srun, torchrun or `saepipe.rank_processes` started.

Nobody else starts ranks: neither Hydra nor Lightning, which would run a whole sweep again in each of them.
"""

import atexit
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from saepipe import progress
from saepipe.config import TrainerConfig
from saepipe.errors import UserError
from saepipe.ranks import Ranks

_MEETING = timedelta(minutes=10)
"""How long a rank waits for the others to start: some may load their libraries from a slow network disk."""

_PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others in one step: rank 0 may be writing a large checkpoint to a slow disk."""


@dataclass(frozen=True)
class Launch:
    """One rank among those that were started together."""

    ranks: Ranks
    """Its number, and how many there are."""
    local_rank: int
    """Its number on its machine."""
    local_world_size: int
    """How many ranks there are on each machine."""
    address: str
    """Where rank 0 is met."""
    port: int
    """The port there."""

    @classmethod
    def alone(cls) -> "Launch":
        """A process that nobody else belongs to."""
        return cls(Ranks(), 0, 1, "", 0)

    @classmethod
    def here(cls, environment: Mapping[str, str] = os.environ) -> "Launch | None":
        """Read what srun or torchrun say of this process; None where neither started it.

        Raises:
            UserError: srun has another number of tasks on some machine than on the others.
        """
        try:
            return cls._read(environment)
        except UserError:
            raise
        except (KeyError, ValueError) as error:
            given = {
                name: value
                for name, value in environment.items()
                if name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
                or name.startswith("SLURM_STEP")
            }
            raise UserError(
                f"the environment does not say which rank this is ({given}): {error!r}; unset these variables, or "
                "start with srun or torchrun, which set all of them"
            ) from error

    @classmethod
    def _read(cls, environment: Mapping[str, str]) -> "Launch | None":
        if {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(environment):
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
            rank, world, local_rank, local_world = (int(environment.get(name, "1")) for name in names)
            address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
            return cls(Ranks(rank, world), local_rank, local_world, address, port)
        if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
            return cls._of_srun(environment)
        return None

    @classmethod
    def _of_srun(cls, environment: Mapping[str, str]) -> "Launch":
        tasks = environment["SLURM_STEP_TASKS_PER_NODE"]  # such as 2(x3)
        each = {int(re.sub(r"\(.*", "", part)) for part in tasks.split(",")}
        if len(each) > 1:
            raise UserError(
                f"srun has SLURM_STEP_TASKS_PER_NODE={tasks}, not the same on every node; set --ntasks-per-node"
            )
        ranks = Ranks(int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]))
        address = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
        # Steps of one job, and jobs that follow each other on a node, should not meet at one port.
        number = int(environment["SLURM_JOB_ID"]) * 31 + int(environment.get("SLURM_STEP_ID", "0"))
        port = int(environment.get("MASTER_PORT") or 15_000 + number % 16_000)
        return cls(ranks, int(environment["SLURM_LOCALID"]), each.pop(), address, port)

    def check(self, trainer: TrainerConfig, *, typed: bool) -> None:
        """Refuse a number of ranks that is not the one asked for.

        Args:
            trainer: What was asked for.
            typed: The user asked for it in so many words.

        Raises:
            UserError: The numbers differ.
        """
        found = (self.local_world_size, self.ranks.world_size // self.local_world_size)
        if typed and (trainer.devices, trainer.num_nodes) != found:
            raise UserError(
                f"trainer.devices={trainer.devices} and trainer.num_nodes={trainer.num_nodes} differ from what was "
                f"started: {found[0]} ranks on each of {found[1]} machines; leave both out, or start as many"
            )

    def quieten(self) -> None:
        """Leave bars and messages to the first rank, which would say the same."""
        if self.ranks.rank:
            progress.hide()
            logging.getLogger("saepipe").setLevel(logging.ERROR)

    def join(self) -> None:
        """Meet the other ranks: make the process group that `Ranks` talks through, once in a process.

        Raises:
            UserError: Not all of them came.
        """
        import torch
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        if (self.ranks.world_size == 1 and not self.address) or dist.is_initialized():
            return
        os.environ |= {"MASTER_ADDR": self.address, "MASTER_PORT": str(self.port)}
        rank, world_size = self.ranks.rank, self.ranks.world_size
        try:
            store, _, _ = next(rendezvous("env://", rank, world_size, timeout=_MEETING))
        except dist.DistError as error:
            raise UserError(
                f"rank {rank} did not meet all of the {world_size} ranks at MASTER_ADDR={self.address} "
                f"MASTER_PORT={self.port} within {_MEETING.seconds // 60} minutes; see why the others ended, and "
                f"whether that address can be reached from every machine ({str(error).splitlines()[0]})"
            ) from error
        store.set_timeout(_PATIENCE)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=_PATIENCE,
        )
        atexit.register(_leave)


def _leave() -> None:
    """End the process group's threads, which at the end of the interpreter would now and then abort the process."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def first_host(nodes: str) -> str:
    """Return the first host of SLURM's way to write several, such as `a[03-07,9]-ib,b1`."""
    match = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    assert match, nodes
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", match[0])
