"""ReLU and an L1 penalty: the first recipe, and still the baseline."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from saepipe import sparse
from saepipe.saes.base import Pass, SAEConfig, Step
from saepipe.saes.l1 import L1SAE, L1Config, active_only


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
            f, mean_f, fired = _Relu.apply(hidden_pre)
            reconstruction = self._reconstruct(f)
        else:
            f = self._selected(active, centred, self.b_enc)
            reconstruction = self._reconstruct_from(f, active)
            mean_f = active.sum_by_latent(f, self.d_sae) / len(target)
            fired = torch.bincount(active.indices, minlength=self.d_sae).float()
        return Pass(reconstruction, fired, {"l1_loss": self._l1(mean_f, step.number)})

    def _activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(hidden_pre)


class _Relu(torch.autograd.Function):
    """ReLU, the mean of each latent, and the number of tokens on which it is active.

    In one, since a gradient of the mean that autograd adds is another tensor of [token, d_sae], and another pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        f = torch.relu(x)
        ctx.save_for_backward(f)
        fired = f.sign().sum(0, dtype=torch.float32)  # half the time of counting what is above 0
        ctx.mark_non_differentiable(fired)
        return f, f.mean(0, dtype=torch.promote_types(f.dtype, torch.float32)), fired

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_f: Tensor, grad_mean: Tensor, _: Tensor) -> Tensor:
        (f,) = ctx.saved_tensors
        grad = grad_f + (grad_mean / len(f)).to(grad_f.dtype)
        return active_only(grad, f)
