"""The learning rate of every step is that of SAELens's schedule of the same name (`make peers`)."""

import warnings

import pytest
import torch

from saepipe.config import LR_SCHEDULERS, OptimConfig
from saepipe.schedule import learning_rate

pytest.importorskip("sae_lens")

STEPS = 61


@pytest.mark.parametrize(("warm_up", "decay", "cycles"), [(0, 0, 1), (5, 0, 1), (0, 10, 2), (5, 10, 3), (7, 20, 4)])
@pytest.mark.parametrize("name", LR_SCHEDULERS)
def test_every_step_has_their_rate(name: str, warm_up: int, decay: int, cycles: int) -> None:
    from sae_lens.training.optim import get_lr_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    keys = {"lr": 2.0, "lr_end": 0.3}
    theirs = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch, of the way SAELens chains its schedulers
        scheduler = get_lr_scheduler(
            name, optimizer, training_steps=STEPS, warm_up_steps=warm_up, decay_steps=decay, num_cycles=cycles, **keys
        )
        for _ in range(STEPS):
            theirs.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    optim = OptimConfig(
        lr_scheduler_name=name, lr_warm_up_steps=warm_up, lr_decay_steps=decay, n_restart_cycles=cycles, **keys
    )
    mine = [learning_rate(optim, step, STEPS) for step in range(STEPS)]
    if name == "cosineannealingwarmrestarts" and (STEPS - warm_up - decay) % cycles:
        # A cycle that is cut off by the decay: theirs jumps back to the peak first, ours ends where the cosine does.
        theirs, mine = theirs[: STEPS - decay], mine[: STEPS - decay]
    assert mine == pytest.approx(theirs, rel=1e-5)
