"""What the architectures with an L1 penalty share: its keys, its warm-up, and a word where it looks mistaken."""

import logging
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe.keys import key
from saepipe.saes.base import SAE, SAEConfig, warm_up

log = logging.getLogger(__name__)


@dataclass
class L1Config(SAEConfig):
    """Keys of the penalty."""

    l1_coefficient: float = key(1.0, least=0)
    """Weight of the L1 penalty; of order 1 where mse_reduction is sum, of order 1e-4 where it is mean."""
    l1_warm_up_steps: int = key(0, least=0)
    """Steps over which the penalty rises linearly from 0."""


class L1SAE(SAE):
    """An autoencoder whose penalty weighs a latent by the norm of its decoder row, so that the rows need no constraint.

    Source: Anthropic's circuits update of April 2024.
    """

    def initialise(
        self,
        generator: torch.Generator,
        *,
        mean: Float[Tensor, " d_out"] | None = None,
        norm_scale: float = 1.0,
        target_scale: float | None = None,
    ) -> None:
        """Set every weight, and say what squared error the penalty is weighed against, and where it looks mistaken."""
        super().initialise(generator, mean=mean, norm_scale=norm_scale, target_scale=target_scale)
        cfg, mean_squares = self.cfg, self.cfg.mse_reduction == "mean"
        log.info(
            "sae.l1_coefficient=%g is weighed against the squared error's %s over %d channels (sae.mse_reduction)",
            *(cfg.l1_coefficient, cfg.mse_reduction, self.d_out),
        )
        if cfg.l1_coefficient > 0 and (cfg.l1_coefficient > 0.05 if mean_squares else cfg.l1_coefficient < 0.01):
            usual = "1e-4" if mean_squares else "1"
            log.warning(
                "sae.l1_coefficient=%g is unusual with sae.mse_reduction=%s, where published values are of order %s; "
                "between sum and mean they differ by a factor of d_out, here %d",
                *(cfg.l1_coefficient, cfg.mse_reduction, usual, self.d_out),
            )

    def _l1(self, mean_f: Float[Tensor, " d_sae"], step: int | Int[Tensor, ""]) -> Float[Tensor, ""]:
        """The mean over tokens of the sum of f times its decoder row's norm; averaged first, it takes less memory."""
        sparsity = (mean_f * self.W_dec.norm(dim=1)).sum()
        return warm_up(step, self.cfg.l1_warm_up_steps) * self.cfg.l1_coefficient * sparsity


def active_only(grad: Float[Tensor, "token d_sae"], f: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_sae"]:
    """Set a gradient to 0 where a latent is not active, in place.

    Args:
        grad: The gradient.
        f: The activations.
    """
    return torch.ops.aten.threshold_backward.grad_input(grad, f, 0, grad_input=grad)
