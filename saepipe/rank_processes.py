"""The ranks of a run on one machine: saepipe's own parent process, which starts them and waits.

The parent is no rank itself: it passes signals on, and when one rank dies it sees that the others end, so that nothing
waits for ever. `srun` and `torchrun` do the same on a cluster.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from saepipe import entry
from saepipe.errors import UserError
from saepipe.launched import Launch
from saepipe.ranks import Ranks
from saepipe.stopping import end_at_once, without_interrupts

PASSED_ON = ("SIGTERM", "SIGUSR1", "SIGUSR2")
"""Signals that the ranks get from the parent as they came."""
_NOTICE_S = 3.0
"""How long the other ranks may take to notice by themselves that one of them ended; then they are asked to."""
_GRACE_S = 15.0
"""How long they may take in all: gloo notices at once, nccl not always, and who still waits for a rank to start not."""


def run(work: Callable[[Any, Launch], object], config: object, world_size: int) -> None:
    """Have ranks do some work together, and wait for them.

    Args:
        work: What each does: an importable function of the configuration and its `Launch`.
        config: The configuration.
        world_size: How many ranks.

    Raises:
        UserError: A rank raised one, or died.
        SystemExit: The ranks stopped at a signal, with that code.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # The store's server is here, and not in rank 0, so that its port is taken before anybody is told of it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    running: list[SpawnProcess] = []
    pipes: list[Connection] = []
    try:
        with _passing_on(running) as sent:
            for rank in range(world_size):
                launch = Launch(Ranks(rank, world_size), rank, world_size, "127.0.0.1", store.port)
                mine, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(work, config, launch, theirs), daemon=True)
                with without_interrupts():
                    process.start()
                theirs.close()
                running.append(process)
                pipes.append(mine)
                for number in sent:  # while it was started
                    os.kill(process.pid or 0, signal.SIGTERM if number == signal.SIGINT else number)
            codes = _wait(running)
    finally:
        for process in running:
            process.kill()
            process.join()
    _judge(codes, pipes, sent)


def _wait(running: list[SpawnProcess]) -> list[int | None]:
    """Wait for all to end, and when one fails, for a while only.

    Returns:
        Their exit codes; None of those that did not end by themselves.
    """
    failed_at: float | None = None
    asked = False
    while waiting := [process for process in running if process.exitcode is None]:
        # Here, and not after the wait: a sentinel comes shortly before the exit code does.
        if failed_at is None and any(process.exitcode for process in running):
            failed_at = time.monotonic()
        left = None if failed_at is None else failed_at + (_GRACE_S if asked else _NOTICE_S) - time.monotonic()
        if left is not None and left <= 0:
            if asked:
                break
            asked = True
            for process in waiting:
                process.terminate()
            continue
        connection.wait([process.sentinel for process in waiting], left)
    return [process.exitcode for process in running]


def _judge(codes: list[int | None], pipes: list[Connection], sent: list[int]) -> None:
    """Raise what the ranks' ends amount to: the first cause before its consequences.

    Args:
        codes: Exit codes of the ranks, negative for a signal; None of those that had to be ended.
        pipes: What each had to say.
        sent: The signals that were passed on to them.
    """
    errors: dict[int, str] = {}
    for rank, pipe in enumerate(pipes):
        with pipe, suppress(EOFError):  # one that died says nothing
            errors[rank] = pipe.recv()
    # A rank that these kill had no handler yet: it was just being started, and stopped as it would have later.
    at_start = {getattr(signal, name, None) for name in PASSED_ON}
    codes = [128 - code if code is not None and -code in at_start else code for code in codes]
    lost = {rank: error for rank, error in errors.items() if LOST in error}
    known = [(rank, code) for rank, code in enumerate(codes) if code is not None and rank not in lost]
    killed = [(rank, -code) for rank, code in known if code < 0]
    failed = [rank for rank, code in known if 0 < code <= 128]
    if own := [error for rank, error in errors.items() if rank not in lost]:
        raise UserError(own[0])
    stopped = [code for code in codes if code is not None and code > 128]
    if stopped and not killed and not failed:
        raise SystemExit(130 if signal.SIGINT in sent else stopped[0])
    if killed:
        rank, number = killed[0]
        raise UserError(
            f"rank {rank} of {len(codes)} was killed ({signal.Signals(number).name}); the same command goes on from "
            "the last checkpoint"
        )
    if failed:
        raise UserError(f"rank {failed[0]} of {len(codes)} failed; its own words are above")
    if lost:
        raise UserError(next(iter(lost.values())))


LOST = "lost the other ranks"
"""Words of an error that is the consequence of another rank's end."""


@contextmanager
def losing_ranks(ranks: Ranks) -> Iterator[None]:
    """Word what torch.distributed raises when another rank has died.

    Raises:
        UserError: Another rank has ended.
    """
    import torch.distributed as dist

    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if ranks.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise UserError(
            f"rank {ranks.rank} of {ranks.world_size} {LOST} ({str(error).splitlines()[0]}); the same command goes on "
            "from the last checkpoint"
        ) from error


@contextmanager
def _passing_on(running: list[SpawnProcess]) -> Iterator[list[int]]:
    """Pass signals on to the ranks; the first Ctrl-C as SIGTERM, the second is Python's.

    Yields:
        A list that holds the signals that came.
    """
    sent: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield sent  # only the main thread may set a handler
        return

    def send(number: int, heard: int | None = None) -> None:
        sent.append(heard or number)
        for process in running:
            if process.exitcode is None and process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def on_interrupt(number: int, _: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        send(signal.SIGTERM, heard=number)

    numbers = [getattr(signal, name) for name in PASSED_ON if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in [*numbers, signal.SIGINT]}
    for number in numbers:
        signal.signal(number, lambda number, _: send(number))
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield sent
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(work: Callable[[Any, Launch], object], config: object, launch: Launch, errors: Connection) -> None:
    """Be a rank, in its own process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent passes it on
    end_at_once(PASSED_ON, told=launch.ranks.rank == 0)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    os.environ |= {
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }  # the parent has the store
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks what this machine's name resolves to
    entry.prepare_process()
    launch.quieten()
    _share_cores(launch.local_world_size)
    code: int | str | None = 0
    try:
        work(config, launch)
    except UserError as error:
        errors.send(str(error))
        code = 2
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    with suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    # Not by way of the interpreter's end: threads of torch.distributed abort the process there once in some 40 times.
    os._exit(code if isinstance(code, int) else 1)


def _share_cores(processes: int) -> None:
    """Take this rank's part of the machine's cores."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
