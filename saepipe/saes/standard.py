"""ReLU and an L1 penalty: the first recipe, and still the baseline."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saepipe import sparse
from saepipe.saes.base import Pass, SAEConfig, Step
from saepipe.saes.l1 import L1SAE, L1Config


@dataclass
class StandardConfig(L1Config):
    """Keys of the standard architecture."""

    architecture: str = "standard"
    """Name of this file."""


class StandardSAE(L1SAE):
    """ReLU encoder, linear decoder."""

    config_class: ClassVar[type[SAEConfig]] = StandardConfig

    def _pass(self, centred: Tensor, target: Tensor, step: Step) -> Pass:
        hidden_pre = self._product(centred, self.b_enc)
        active = sparse.few(hidden_pre)
        if active is None:
            f = self._activate(hidden_pre)
            reconstruction, mean_f = self._reconstruct(f), f.mean(0, dtype=self.W_dec.dtype)
            fired = f.detach().sign().sum(0, dtype=torch.float32)  # half the time of counting what is above 0
        else:
            f = self._selected(active, centred, self.b_enc)
            reconstruction = self._reconstruct_from(f, active)
            mean_f = active.sum_by_latent(f, self.d_sae) / len(target)
            fired = torch.bincount(active.indices, minlength=self.d_sae).float()
        return Pass(reconstruction, fired, {"l1_loss": self._l1(mean_f, step.number)})

    def _activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(hidden_pre)
