"""How many steps a run has, and which of its keys have no effect in as many."""

from collections.abc import Iterator

from saepipe.config import RunConfig
from saepipe.errors import UserError

_BELONGS = {
    "optim.n_restart_cycles": ("optim.lr_scheduler_name", "cosineannealingwarmrestarts"),
    "sae.target_l0": ("sae.sparsity_loss", "quadratic"),
    "sae.tanh_scale": ("sae.sparsity_loss", "tanh"),
    "sae.aux_loss_coefficient": ("sae.dead_method", "auxk"),
    "sae.resample_every_steps": ("sae.dead_method", "resample"),
    "sae.resample_times": ("sae.dead_method", "resample"),
    "sae.resample_scale": ("sae.dead_method", "resample"),
}
"""Key -> the key and the value of it without which it does nothing."""


def total_steps(config: RunConfig, world_size: int) -> int:
    """Count the steps of a run, and say what does not fit it.

    Raises:
        UserError: Not one step, or a share of the batch that has not so many parts.
    """
    steps, share = config.train.tokens // config.stream.batch_tokens, config.stream.batch_tokens // world_size
    if not steps:
        raise UserError(
            f"train.tokens={config.train.tokens} is less than one batch; give at least "
            f"stream.batch_tokens={config.stream.batch_tokens}"
        )
    if share % config.train.micro_batches:
        raise UserError(
            f"train.micro_batches={config.train.micro_batches} does not divide the {share} rows that each of "
            f"{world_size} ranks has of stream.batch_tokens={config.stream.batch_tokens}; choose one that does"
        )
    return steps


_UNSETTLED = 0.05
"""Part of the way from its start that a threshold may lack at the end of a run."""


def in_vain(config: RunConfig, steps: int) -> Iterator[str]:
    """Word what has no effect: what comes too late, as after train.tokens was lowered, and keys of another choice."""
    warm_up, decay, sae = config.optim.lr_warm_up_steps, config.optim.lr_decay_steps, config.sae
    if warm_up + decay > steps:
        yield (
            f"optim.lr_warm_up_steps={warm_up} and optim.lr_decay_steps={decay} are longer than the run's {steps} "
            f"steps: the rate never reaches optim.lr; try optim.lr_warm_up_steps={steps // 20} "
            f"optim.lr_decay_steps={steps // 5}"
        )
    for name in ("l1", "l0"):
        if (length := getattr(sae, f"{name}_warm_up_steps", 0)) > steps:
            yield (
                f"sae.{name}_warm_up_steps={length} is longer than the run's {steps} steps: the penalty never reaches "
                f"sae.{name}_coefficient; try sae.{name}_warm_up_steps={steps // 20}"
            )
    threshold_lr = getattr(sae, "topk_threshold_lr", 1)
    if (1 - threshold_lr) ** steps > _UNSETTLED:
        yield (
            f"sae.topk_threshold_lr={threshold_lr} is too slow for the run's {steps} steps: the threshold stays low, "
            f"and outside of training more latents are active than sae.k={sae.k}; try "
            f"sae.topk_threshold_lr={min(1, round(5 / steps, 3))}"
        )
    if sae.dead_method == "resample" and sae.resample_every_steps >= steps:
        yield (
            f"sae.resample_every_steps={sae.resample_every_steps} does not come within the run's {steps} steps: no "
            f"latent is resampled; try sae.resample_every_steps={max(1, steps // 5)}"
        )
    if config.named("sae.expansion") and sae.d_sae is not None:
        yield f"sae.expansion={sae.expansion} has no effect with sae.d_sae={sae.d_sae}; leave one of them out"
    tokens = steps * config.stream.batch_tokens
    if sae.dead_method != "none" and sae.dead_after_tokens >= tokens:
        yield (
            f"sae.dead_after_tokens={sae.dead_after_tokens} is not less than the run's {tokens} tokens: no latent "
            f"counts as dead, and sae.dead_method={sae.dead_method} does nothing; try "
            f"sae.dead_after_tokens={tokens // 10}"
        )
    for key, (choice, value) in _BELONGS.items():
        group, name = choice.split(".")
        chosen = getattr(getattr(config, group), name, None)
        if config.named(key) and chosen != value:
            yield f"{key} has no effect with {choice}={chosen}; it belongs to {choice}={value}"
