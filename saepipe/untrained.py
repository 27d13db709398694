"""The SAE of a configuration before its first step; and what does not fit the store, the ranks or the machine."""

import torch

from saepipe import saes
from saepipe.config import RunConfig
from saepipe.errors import UserError
from saepipe.run_length import total_steps
from saepipe.saes.base import SAE
from saepipe.stream import HasHooks, check_ranks, choose_hook, choose_target


def untrained(config: RunConfig, store: HasHooks) -> SAE:
    """Make an SAE whose weights are still zero.

    Raises:
        UserError: A key that does not fit the store's hooks.
    """
    hook = choose_hook(store, config.stream)
    target = choose_target(store, config.stream, hook)
    sae = saes.architecture(config.sae.architecture)(
        config.sae, store.width(hook), store.width(target) if target else None
    )
    if config.train.compile and sae.sparse_step:
        raise UserError(
            f"train.compile=true does not go with sae={config.sae.architecture}, whose sparse step it would only "
            "slow down; leave it out"
        )
    return sae


def refuse_unfit(config: RunConfig, store: HasHooks, world_size: int) -> None:
    """Look at what may be refused, which takes no memory.

    Args:
        config: The run, or a point of a grid.
        store: Its store.
        world_size: How many ranks share a batch.

    Raises:
        UserError: What does not fit; the message names the key, the value and the cure.
    """
    check_ranks(config.stream, world_size)
    total_steps(config, world_size)
    with torch.device("meta"):
        untrained(config, store)
    accelerator = config.trainer.accelerator
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if not {"cuda": cuda, "mps": mps, "gpu": cuda or mps}.get(accelerator, True):
        raise UserError(f"trainer.accelerator={accelerator} is not on this machine; try trainer.accelerator=auto")
