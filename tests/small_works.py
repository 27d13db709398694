"""What tests have other processes do, where shapes are not checked and nothing else is imported."""

import copy
import functools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import small_saes
import torch
from torch import Tensor

from saepipe import progress, saes
from saepipe.config import OptimConfig
from saepipe.errors import UserError
from saepipe.launched import Launch
from saepipe.point import Point
from saepipe.rank_processes import PASSED_ON, losing_ranks


def elsewhere(work: Callable[..., Any], *arguments: object) -> list[Any]:
    """Have a fresh process do a work of this module for each of some arguments, and return what it returns."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(work, arguments))


def compiled(name: str, *, steps: int, into_code: bool) -> tuple[float, float, int]:
    """Take steps with a compiled loss beside one that is not.

    Args:
        name: The architecture, whose penalty warms up.
        steps: How many.
        into_code: Have a C++ compiler at it; otherwise, run the graphs as they are.

    Returns:
        Largest relative differences of a loss and of a weight, and how many graphs were compiled.
    """
    warnings.filterwarnings("error")
    warnings.filterwarnings("ignore", ".*script_method.*", DeprecationWarning)  # torch 2.13 of itself
    warnings.filterwarnings("ignore", ".*should not be instantiated.*", DeprecationWarning)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    if not into_code:
        torch.compile = functools.partial(torch.compile, backend=backend)
    has = vars(saes.architecture(name).config_class())
    keys = {key: steps for key in ("l1_warm_up_steps", "l0_warm_up_steps") if key in has}
    one = Point(small_saes.make(name, **keys), OptimConfig(lr=0.01), total_steps=steps, compile=True)
    plain = Point(copy.deepcopy(one.sae), one.optim, total_steps=steps)
    one.make_optimizer()
    plain.make_optimizer()
    worst, generator = 0.0, torch.Generator().manual_seed(0)
    for number in range(steps):
        x = torch.randn(32, small_saes.D_IN, generator=generator)
        (found, _), (expected, _) = (point.take_step(x, x, number, measure=True) for point in (one, plain))
        assert found.terms.keys() == expected.terms.keys()
        for term, value in expected.terms.items():
            worst = max(worst, float(((found.terms[term] - value) / value).abs()))
    apart = max(
        float((mine - theirs).detach().norm() / theirs.detach().norm())
        for mine, theirs in zip(one.sae.parameters(), plain.sae.parameters(), strict=True)
    )
    return worst, apart, len(graphs)


def report(folder: Path, launch: Launch) -> None:
    """Write down what a rank finds itself to be."""
    found = {
        "launch": launch,
        "ignores_interrupts": signal.getsignal(signal.SIGINT) == signal.SIG_IGN,
        "hidden": progress.bar("nothing", 1).disable,
        "level": logging.getLogger("saepipe").level,
        "parent": os.getppid(),
    }
    (folder / str(launch.ranks.rank)).write_bytes(pickle.dumps(found))


def refuse_or_hang(folder: Path, launch: Launch) -> None:
    """Have the second rank raise what a user can put right, while the first one waits for ever."""
    (folder / str(launch.ranks.rank)).write_text(str(os.getpid()))
    launch.join()
    torch.distributed.barrier()
    if launch.ranks.rank == 1:
        raise UserError("sae.k=0 is out of range")
    threading.Event().wait()


def die(killed: bool, launch: Launch) -> None:
    """Have the second rank die while the first one waits for its part of a sum."""
    launch.join()
    with losing_ranks(launch.ranks):
        launch.ranks.sum(torch.ones(3))
        if launch.ranks.rank == 1:
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ZeroDivisionError("nobody can put this right")
        launch.ranks.sum(torch.ones(3))


def take_signals(folder: Path, launch: Launch) -> None:
    """Have the first rank send each signal to the parent, and all of them note what comes; stop at the last."""
    come, came = _signals_to_read(), []
    launch.join()
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
        torch.distributed.barrier()
        if launch.ranks.rank == 0:
            os.kill(os.getppid(), number)
        came += os.read(come, 1)
    (folder / str(launch.ranks.rank)).write_text(str(came))
    raise SystemExit(128 + came[-1])


def interrupt_twice(folder: Path, launch: Launch) -> None:
    """Have the first rank interrupt its parent, and again once the first one was passed on; and never end."""
    come = _signals_to_read()
    (folder / str(launch.ranks.rank)).write_text(str(os.getpid()))
    launch.join()
    torch.distributed.barrier()
    if launch.ranks.rank == 0:
        os.kill(os.getppid(), signal.SIGINT)
        assert os.read(come, 1)[0] == signal.SIGTERM
        os.kill(os.getppid(), signal.SIGINT)
    threading.Event().wait()


def _signals_to_read() -> int:
    """Have the number of each signal that is passed on come as a byte to read."""
    come, goes = os.pipe()
    os.set_blocking(goes, False)
    signal.set_wakeup_fd(goes)
    for name in PASSED_ON:
        signal.signal(getattr(signal, name), lambda *_: None)
    return come
