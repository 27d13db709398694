"""ReLU and an L1 penalty: the first recipe, and still the baseline."""

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saepipe.keys import key
from saepipe.saes.base import SAE, Pass, SAEConfig

log = logging.getLogger(__name__)


@dataclass
class StandardConfig(SAEConfig):
    """Keys of the standard architecture."""

    architecture: str = "standard"
    """Name of this file."""
    l1_coefficient: float = key(1.0, least=0)
    """Weight of the L1 penalty; of order 1 where mse_reduction is sum, of order 1e-4 where it is mean."""
    l1_warm_up_steps: int = key(0, least=0)
    """Steps over which the penalty rises linearly from 0."""


class StandardSAE(SAE):
    """ReLU encoder, linear decoder.

    Source: Anthropic's circuits update of April 2024: the penalty weighs a latent by the norm of its decoder row, so
    the rows need no constraint.
    """

    config_class: ClassVar[type[SAEConfig]] = StandardConfig

    def initialise(
        self, generator: torch.Generator, *, mean: Float[Tensor, " d_out"] | None = None, norm_scale: float = 1.0
    ) -> None:
        """Set every weight, and say where the penalty looks like one for the other `mse_reduction`."""
        super().initialise(generator, mean=mean, norm_scale=norm_scale)
        cfg, mean_squares = self.cfg, self.cfg.mse_reduction == "mean"
        if cfg.l1_coefficient > 0 and (cfg.l1_coefficient > 0.05 if mean_squares else cfg.l1_coefficient < 0.01):
            usual = "1e-4" if mean_squares else "1"
            log.warning(
                "sae.l1_coefficient=%g is unusual with sae.mse_reduction=%s, where published values are of order %s; "
                "between sum and mean they differ by a factor of d_in, here %d",
                *(cfg.l1_coefficient, cfg.mse_reduction, usual, self.d_in),
            )

    def _pass(self, centred: Tensor, target: Tensor, *, step: int, dead: Tensor) -> Pass:
        """The penalty is the mean over tokens of the sum of f times its decoder row's norm."""
        f = self._activate(self._hidden_pre(centred))
        reconstruction = self._reconstruct(f)
        # Averaged over tokens first: in float32 under autocast too, and without another tensor of [token, d_sae].
        sparsity = (f.mean(0, dtype=self.W_dec.dtype) * self.W_dec.norm(dim=1)).sum()
        warm = min((step + 1) / max(self.cfg.l1_warm_up_steps, 1), 1.0)
        fired = (f.detach() > 0).sum(0, dtype=torch.float32)
        return Pass(reconstruction, fired, {"l1": warm * self.cfg.l1_coefficient * sparsity})

    def _activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(hidden_pre)
