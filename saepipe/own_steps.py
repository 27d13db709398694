"""Steps of saepipe's own for a comparison: the train verb's, and the one product that no step can do without."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saepipe import saes
from saepipe.config import OptimConfig
from saepipe.contest import Task
from saepipe.launched import Launch
from saepipe.point import Point
from saepipe.ranks import Ranks

LIBRARIES = ("saepipe", "product")
LR = 1e-8
"""Learning rate of every library: so small that as many latents fire at the end as at the beginning."""
NEVER = 10**12
"""Tokens without firing after which a latent counts as dead: none does, for anybody."""


@dataclass(frozen=True)
class Steps:
    """Training steps of some library."""

    take: Callable[[Float[Tensor, "token d_in"]], Any]
    """Take one on a batch."""
    l0: Callable[[Any], float]
    """Active latents of a token, from what a step returned."""


def maker(task: Task) -> Callable[[list[Tensor]], Steps]:
    """Give what makes the steps of a task, from the batches."""
    made = _product if task.library == "product" else _saepipe
    return lambda batches: made(task, batches)


def autocast(task: Task) -> AbstractContextManager[object]:
    """Give the precision that is asked for, as trainers do."""
    return torch.autocast(task.device, torch.bfloat16) if task.precision == "bf16-mixed" else nullcontext()


def set_l0(
    architecture: str,
    weights: Mapping[str, Tensor],
    x: Float[Tensor, "token d_in"],
    l0: float,
) -> None:
    """Set biases or thresholds so that so many latents fire on a token of a batch, as after training.

    All of them get one value, a quantile of the batch's pre-activations; saepipe and SAELens name weights alike.
    """
    with torch.no_grad():
        hidden_pre = (x - weights["b_dec"]) @ weights["W_enc"]
        least = hidden_pre.flatten().topk(int(l0 * len(x))).values[-1]
        name, value = {"jumprelu": ("threshold", least), "gated": ("b_gate", -least)}.get(
            architecture, ("b_enc", -least)
        )
        weights[name].fill_(value)


def _saepipe(task: Task, batches: list[Tensor]) -> Steps:
    """Make the step that the train verb takes: clipping's norm, counters and dead latents are in it."""
    cls = saes.architecture(task.architecture)
    keys: dict[str, Any] = {"dead_after_tokens": NEVER, **task.sae}
    if "k" in cls.config_class.__dataclass_fields__:
        keys.setdefault("k", task.k)
    sae = cls(cls.config_class(d_sae=task.d_sae, **keys), task.d_in)
    sae.initialise(torch.Generator().manual_seed(0), mean=batches[0].mean(0).cpu())
    compiled = task.compile and not sae.sparse_step
    point = Point(sae, OptimConfig(lr=LR), total_steps=NEVER, compile=compiled).to(task.device)
    if task.l0 is not None:
        set_l0(task.architecture, dict(sae.named_parameters()), batches[0], task.l0)
    point.make_optimizer()
    if task.world_size > 1:
        ranks = Ranks(task.rank, task.world_size)
        Launch(ranks, task.rank, task.world_size, "127.0.0.1", task.port).join()
        point.join(ranks)
    number = 0

    def take(x: Tensor) -> Any:
        nonlocal number
        with autocast(task):
            batch, _ = point.take_step(x, x, number, measure=False)
        number += 1
        return batch

    return Steps(take, lambda batch: float(batch.fired.sum() / batch.tokens))


def _product(task: Task, batches: list[Tensor]) -> Steps:
    """Make the encoder's product, 2 d_in d_sae FLOP a token: a sparse step's every other part is small beside it."""
    del batches
    weight = torch.randn(task.d_sae, task.d_in, device=task.device)
    if task.precision == "bf16-mixed":
        weight = weight.bfloat16()
    return Steps(lambda x: torch.nn.functional.linear(x.to(weight.dtype), weight), lambda _: float(task.d_sae))
