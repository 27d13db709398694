"""Gated: one path decides whether a latent is active, another how much; only the first one is penalised."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saepipe import sparse
from saepipe.saes.base import Pass, SAEConfig, Step
from saepipe.saes.l1 import L1SAE, L1Config, active_only


@dataclass
class GatedConfig(L1Config):
    """Keys of the gated architecture."""

    architecture: str = "gated"
    """Name of this file."""


class GatedSAE(L1SAE):
    """Gated autoencoder: f = step(x W_enc + b_gate) * relu(x (W_enc exp(r_mag)) + b_mag).

    Source: Rajamanoharan et al. 2024 (arXiv 2404.16014), equations 6 to 8. As in SAELens, and unlike the paper, the
    penalty weighs a gate by the norm of its decoder row, and the auxiliary term trains the decoder as well.
    """

    config_class: ClassVar[type[SAEConfig]] = GatedConfig
    latent_parameters = ("b_gate", "b_mag", "r_mag")
    log_parameters = ("r_mag",)
    b_gate: nn.Parameter
    b_mag: nn.Parameter
    r_mag: nn.Parameter

    def _pass(self, centred: Tensor, target: Tensor, step: Step) -> Pass:
        """The auxiliary term is the error of what the gates alone reconstruct, without which they learn nothing."""
        hidden_pre = self._product(centred, None)
        open_ = sparse.few(hidden_pre, -self.b_gate.detach())
        if open_ is None:
            f, gates, mean_gates, fired = _Gate.apply(hidden_pre, self.r_mag.exp(), self.b_mag, self.b_gate)
            reconstruction, of_gates = self._reconstruct(f), self._reconstruct(gates)
        else:
            pre = self._selected(open_, centred, None)
            r_mag, b_mag, b_gate = (
                each.index_select(0, open_.indices) for each in (self.r_mag, self.b_mag, self.b_gate)
            )
            f, gates = torch.relu(pre * r_mag.exp() + b_mag), torch.relu(pre + b_gate)
            reconstruction, of_gates = self._reconstruct_from(f, open_), self._reconstruct_from(gates, open_)
            fired = open_.sum_by_latent((f.detach() > 0).float(), self.d_sae)
            mean_gates = open_.sum_by_latent(gates, self.d_sae) / len(target)
        terms = {
            "l1_loss": self._l1(mean_gates, step.number),
            "auxiliary_reconstruction_loss": self._mse(target, of_gates),
        }
        return Pass(reconstruction, fired, terms)

    def _hidden_pre(self, centred: Tensor) -> Tensor:
        """The product that both paths start from, without their biases."""
        return centred @ self.W_enc

    def _activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return torch.relu(hidden_pre * self.r_mag.exp() + self.b_mag) * (hidden_pre + self.b_gate > 0)


class _Gate(torch.autograd.Function):
    """Both paths, the mean gate of each latent, and the number of tokens on which it is active.

    In one, since each pass over [token, d_sae] that is spared is a part of the step. Where a gate is open, it is the
    input and its bias, so the input itself need not be kept.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, factor: Tensor, b_mag: Tensor, b_gate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gates = (x + b_gate).relu_()
        f = torch.addcmul(b_mag, x, factor).relu_().mul_(gates.sign())
        ctx.save_for_backward(factor, b_gate, f, gates)
        fired = f.sign().sum(0, dtype=torch.float32)
        ctx.mark_non_differentiable(fired)
        return f, gates, gates.mean(0, dtype=torch.promote_types(gates.dtype, torch.float32)), fired

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_f: Tensor, grad_gates: Tensor, grad_mean: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        factor, b_gate, f, gates = ctx.saved_tensors
        grad_x = active_only(grad_gates + (grad_mean / len(f)).to(grad_gates.dtype), gates)
        of_f = torch.ops.aten.threshold_backward(grad_f, f, 0)
        grad_b_mag, grad_b_gate = (each.sum(0, dtype=factor.dtype) for each in (of_f, grad_x))
        grad_x.addcmul_(of_f, factor)
        grad_factor = of_f.mul_(gates).sum(0, dtype=factor.dtype) - b_gate * grad_b_mag
        return grad_x, grad_factor, grad_b_mag, grad_b_gate
