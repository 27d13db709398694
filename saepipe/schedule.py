"""The learning rate's course over a run."""

import math

from saepipe.config import OptimConfig


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Compute the learning rate of a step; a pure function, so that a resumed run needs no scheduler's state.

    Warm-up rises linearly to `lr`, decay falls linearly to 0 over the last steps. Between them the rate is constant
    (`constant`), falls along half a cosine to `lr_end` (`cosineannealing`), or does so `n_restart_cycles` times
    (`cosineannealingwarmrestarts`). The decay goes on from where the cosine ended.

    Args:
        optim: Peak rate, end, course, lengths of warm-up and decay.
        step: Optimizer step, from 0.
        total_steps: Steps of the whole run.

    Source: SAELens's schedules of these names, which a test compares with step by step.
    """
    decay_from = total_steps - optim.lr_decay_steps
    rate = _course(optim, min(step, decay_from) - optim.lr_warm_up_steps, decay_from - optim.lr_warm_up_steps)
    if step < optim.lr_warm_up_steps:
        rate *= (step + 1) / optim.lr_warm_up_steps
    if step >= decay_from and optim.lr_decay_steps:
        rate *= (total_steps - step) / optim.lr_decay_steps
    return rate


def _course(optim: OptimConfig, step: int, steps: int) -> float:
    """Compute the rate between warm-up and decay, at its start before and at its end after."""
    if optim.lr_scheduler_name == "constant":
        return optim.lr
    end = optim.lr / 10 if optim.lr_end is None else optim.lr_end
    done = min(1.0, max(0, step) / max(1, steps))
    if optim.lr_scheduler_name == "cosineannealingwarmrestarts" and done < 1:
        cycle = max(1, steps // optim.n_restart_cycles)
        done = max(0, step) % cycle / cycle
    return end + (optim.lr - end) * (1 + math.cos(math.pi * done)) / 2
