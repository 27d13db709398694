"""ReLU and an L1 penalty: the first recipe, and still the baseline."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

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
        f = self._activate(self._hidden_pre(centred))
        fired = (f.detach() > 0).sum(0, dtype=torch.float32)
        return Pass(self._reconstruct(f), fired, {"l1_loss": self._l1(f, step.number)})

    def _activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(hidden_pre)
