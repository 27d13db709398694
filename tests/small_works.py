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
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import small_saes
import torch
from torch import Tensor

from saepipe import progress, saes
from saepipe.config import OptimConfig, RunConfig
from saepipe.errors import UserError
from saepipe.launched import Launch
from saepipe.point import Point
from saepipe.rank_processes import PASSED_ON, losing_ranks
from saepipe.ranks import Ranks
from saepipe.saes.batchtopk import candidates, kth_largest, smallest_kept


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


def exchange(folder: Path, launch: Launch) -> None:
    """Do all that ranks exchange, write down what comes of it, and train."""
    launch.join()
    ranks = launch.ranks
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.float64, torch.int64):
        mine = torch.tensor([1 + ranks.rank, -3, 7 * ranks.rank], dtype=dtype)
        found[f"sum {dtype}"], found[f"least {dtype}"] = ranks.sum(mine.clone()), ranks.least(mine.clone())
    found["lanes"] = [ranks.lanes(part, LANES) for part in (rows(ranks), rows(ranks)[:, 0])]
    for name, values, count in kept_cases(generator):
        mine = values.chunk(ranks.world_size)[ranks.rank]
        found[f"smallest {name}"] = kept(mine, count, ranks)
        found[f"parts {name}"] = kept(mine, count, ranks, parts=3)
        if 0 < count <= int((values > 0).sum()):
            found[f"kth {name}"] = kth_largest(mine[mine > 0], count, ranks)
    torch.save(found, folder / f"{ranks.rank}.pt")


LANES = 4


def rows(ranks: Ranks) -> Tensor:
    """Rows 0 to 23 of a batch of four lanes, as far as they are a rank's."""
    batch = torch.arange(24).reshape(LANES, 6, 1)
    return batch[ranks.rank :: ranks.world_size].reshape(-1, 1)


def kept_cases(generator: torch.Generator) -> Iterator[tuple[str, Tensor, int]]:
    """Values of a batch, by name, and how many of them to keep."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        normal = torch.randn(6000, generator=generator, dtype=torch.float64)
        skewed = torch.cat([normal[:3000].abs(), normal[3000:] - 9])  # most of what is kept is the first rank's
        for shape, values in {"normal": normal, "skewed": skewed, "tied": (4 * normal).round()}.items():
            for count in (0, 1, 7, 300, 2500, 4000):
                yield f"{shape} {count} {dtype}", values.to(dtype), count


def kept(values: Tensor, count: int, ranks: Ranks, parts: int = 1) -> tuple[Tensor, int]:
    """Find the smallest value that is kept, and how many of this rank's are."""
    if parts > 1:
        values = candidates(iter(values.chunk(parts)), count)
    smallest, places = smallest_kept(values, count, ranks)
    return smallest, int((values[places] >= smallest).sum())


def exchange_and_train(given: tuple[Path, list[RunConfig]], launch: Launch) -> None:
    """Do all that ranks exchange, and then train some runs."""
    import small_runs

    exchange(given[0], launch)
    small_runs.train_each(given[1], launch)
