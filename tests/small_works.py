"""What tests have other processes do, where shapes are not checked and nothing else is imported."""

import copy
import functools
import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import small_saes
import torch
from torch import Tensor

from saepipe import saes
from saepipe.config import OptimConfig
from saepipe.point import Point


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
