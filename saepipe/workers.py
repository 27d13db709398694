"""The processes that make one store together: which of them this is, and those that it starts on its own machine.

They share nothing but the store's folder (`saepipe.claims`), so they may come and go, on any number of machines.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from saepipe import progress
from saepipe.errors import UserError
from saepipe.stopping import without_interrupts

_PATIENCE_S = 10.0


@dataclass(frozen=True)
class Worker:
    """One process among those that were started to do the same work."""

    index: int = 0
    """Its number among all: where it begins, so that no two begin at the same place."""
    count: int = 1
    """How many there are, as far as it knows."""
    local_rank: int = 0
    """Its number on this machine: which GPUs are its own."""

    @classmethod
    def here(cls, environment: Mapping[str, str]) -> "Worker":
        """Read which process this is from what SLURM (`srun`, array jobs) or `torchrun` tell it.

        Args:
            environment: The process' environment variables.
        """

        def number(name: str, default: int = 0) -> int:
            value = environment.get(name, "")
            return int(value) if value.isdecimal() else default

        if "LOCAL_RANK" in environment:  # torchrun
            index, count, local_rank = number("RANK"), number("WORLD_SIZE"), number("LOCAL_RANK")
        else:
            index, count, local_rank = number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS"), number("SLURM_LOCALID")
        count, tasks, stride = max(1, count), number("SLURM_ARRAY_TASK_COUNT"), number("SLURM_ARRAY_TASK_STEP")
        first = number("SLURM_ARRAY_TASK_MIN")
        task = max(0, number("SLURM_ARRAY_TASK_ID", first) - first) // max(1, stride)
        return cls(task * count + index, count * max(1, tasks), local_rank)

    def split(self, workers: int) -> list["Worker"]:
        """Return the workers that this one becomes when it starts others on its machine, itself first."""
        return [
            Worker(self.index * workers + i, self.count * workers, self.local_rank * workers + i)
            for i in range(workers)
        ]


@contextmanager
def started(work: Callable[[Any, Worker], object], config: object, helpers: list[Worker]) -> Iterator[None]:
    """Have helpers work while the block runs, and wait for them after it.

    A helper that dies is no error: what it had claimed is free again, and the others do it. They end with this process,
    however it ends.

    Args:
        work: What each helper does: an importable function of the configuration and the helper's `Worker`.
        config: The configuration.
        helpers: Which workers they are.

    Raises:
        UserError: A helper's work raised one.
    """
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    running: list[SpawnProcess] = []
    pipes: list[Connection] = []
    try:
        with _patient_threads():
            for helper in helpers:
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(work, config, helper, theirs), daemon=True)
                with without_interrupts():
                    process.start()
                theirs.close()
                running.append(process)
                pipes.append(mine)
        yield
        for process in running:
            process.join()
    finally:
        for process in running:
            process.kill()  # those that still run, since the block raised
        for process in running:
            process.join(_PATIENCE_S)
    for pipe in pipes:
        with pipe, suppress(EOFError):  # one that died says nothing
            raise UserError(pipe.recv())


@contextmanager
def _patient_threads() -> Iterator[None]:
    """Have processes that are started in the block share the cores: threads that wait must not spin on them."""
    given = "OMP_WAIT_POLICY" in os.environ
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        yield
    finally:
        if not given:
            del os.environ["OMP_WAIT_POLICY"]


def _run(
    work: Callable[[Any, Worker], object],
    config: object,
    helper: Worker,
    errors: Connection,
) -> None:
    """Do a helper's work in its own process."""
    end_with_parent()
    progress.hide()
    try:
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        work(config, helper)
    except UserError as error:
        errors.send(str(error))
    except KeyboardInterrupt:  # which the parent tells of
        os._exit(130)


def end_with_parent() -> None:
    """Have this process end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def alone(config: Any) -> Any:
    """Return a configuration whose process starts no others."""
    return replace(config, cache=replace(config.cache, workers=1))
