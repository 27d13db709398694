"""JumpReLU: each latent has a threshold of its own, learned through straight-through estimators."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from saepipe import sparse
from saepipe.errors import UserError
from saepipe.keys import key
from saepipe.saes.base import SAE, Losses, Pass, SAEConfig, Step, warm_up

SPARSITY_LOSSES = ("step", "tanh", "quadratic")


@dataclass
class JumpReLUConfig(SAEConfig):
    """Keys of the JumpReLU architecture (in SAELens, most of them begin with `jumprelu_`)."""

    architecture: str = "jumprelu"
    """Name of this file."""
    sparsity_loss: str = key("step", choices=SPARSITY_LOSSES)
    """step: number of active latents (DeepMind); tanh: tanh(tanh_scale f |W_dec|), summed (Anthropic); quadratic:
    2 / target_l0 (L0 - target_l0)^2 for each token (Gemma Scope 2)."""
    l0_coefficient: float = key(1.0, least=0)
    """Weight of the sparsity loss."""
    l0_warm_up_steps: int = key(0, least=0)
    """Steps over which it rises linearly from 0."""
    target_l0: float | None = key(None, above=0)
    """Active latents per token that the quadratic loss aims at."""
    tanh_scale: float = key(4.0, above=0)
    """Steepness of the tanh loss."""
    init_threshold: float = key(0.01, least=0)
    """Every threshold at the start."""
    bandwidth: float = key(0.05, above=0)
    """Width of the window around its threshold in which a pre-activation moves the threshold."""
    ste_to_input: bool = False
    """Pass the estimators' gradient to the pre-activations too (Anthropic), not to the thresholds alone (DeepMind)."""
    pre_act_loss_coefficient: float | None = key(None, least=0)
    """Weight of Anthropic's pre-activation loss, which lifts dead latents towards their threshold; None leaves it out,
    3e-6 is Anthropic's."""

    def __post_init__(self) -> None:
        """Check what a range cannot say."""
        super().__post_init__()
        if self.sparsity_loss == "quadratic" and self.target_l0 is None:
            raise UserError("sae.target_l0=null does not go with sae.sparsity_loss=quadratic; give the L0 to aim at")

    def resolve(self, d_in: int) -> int:
        """Width of the SAE, which must hold target_l0 latents."""
        d_sae = super().resolve(d_in)
        if self.target_l0 is not None and self.target_l0 > d_sae:
            raise UserError(f"sae.target_l0={self.target_l0} is more than the {d_sae} latents there are; lower it")
        return d_sae


class JumpReLUSAE(SAE):
    """JumpReLU autoencoder: f = h step(h - threshold).

    Source: Rajamanoharan et al. 2024 (arXiv 2407.14435), equations 11 and 12 for the estimators; Anthropic's circuits
    update of January 2025 for tanh, `ste_to_input` and the pre-activation loss. As in SAELens, the threshold itself is
    trained, not its logarithm, and kept from falling below 0; the pre-activation loss takes dead latents alone.
    """

    config_class: ClassVar[type[SAEConfig]] = JumpReLUConfig
    latent_parameters = ("b_enc", "threshold")
    threshold: nn.Parameter

    @property
    def revives(self) -> bool:
        """Whether a term for dead latents is on; the pre-activation loss is one."""
        return super().revives or bool(self.cfg.pre_act_loss_coefficient)

    def _pass(self, centred: Tensor, target: Tensor, step: Step) -> Pass:
        hidden_pre = self._product(centred, self.b_enc)
        # Also what is below its threshold, but in the window where it moves it; somewhat more, for rounding.
        found = sparse.few(hidden_pre, self.threshold.detach() - 0.51 * self.cfg.bandwidth)
        if found is None:
            f, l0, fired = self._jump(hidden_pre, self.threshold)
            reconstruction = self._reconstruct(f)
        else:
            pre = self._selected(found, centred, self.b_enc)
            threshold = self.threshold.index_select(0, found.indices)
            f, l0, fired = self._jump(pre, threshold, found)
            reconstruction = self._reconstruct_from(f, found)
        weight = warm_up(step.number, self.cfg.l0_warm_up_steps) * self.cfg.l0_coefficient
        terms = {"l0_loss": weight * self._sparsity(f, l0, found)}
        if self.cfg.pre_act_loss_coefficient:
            terms["pre_act_loss"] = self._pre_act(centred, step.find_dead())
        return Pass(reconstruction, fired, terms)

    def _start_of(self, name: str) -> float:
        return self.cfg.init_threshold if name == "threshold" else super()._start_of(name)

    def _sparsity(self, f: Tensor, l0: Tensor, found: sparse.Entries | None) -> Tensor:
        """Return the mean over tokens, whose active latents `l0` counts."""
        if self.cfg.sparsity_loss == "tanh":
            norms = self.W_dec.norm(dim=1)
            norms = norms if found is None else norms.index_select(0, found.indices)
            return torch.tanh(self.cfg.tanh_scale * f * norms).sum() / len(l0)
        if self.cfg.sparsity_loss == "quadratic":
            return (2 / self.cfg.target_l0 * (l0 - self.cfg.target_l0).square()).mean()
        return l0.mean()

    def _jump(
        self, hidden_pre: Tensor, threshold: Tensor, found: sparse.Entries | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Activations, how many of each token's latents are active, and on how many tokens each latent is."""
        cfg = self.cfg
        f, l0, fired = _Jump.apply(hidden_pre, threshold, cfg.bandwidth, cfg.ste_to_input, found, self.d_sae)
        return f, l0, fired

    def _pre_act(self, centred: Tensor, dead: Tensor) -> Tensor:
        below = torch.relu(self.threshold[dead] - self._hidden_pre_of(centred, dead))
        return self.cfg.pre_act_loss_coefficient * (below * self.W_dec[dead].norm(dim=1)).sum(1).mean()

    def _activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return self._jump(hidden_pre, self.threshold)[0]

    @torch.no_grad()
    def after_step(self, losses: Losses) -> None:
        """Keep the thresholds from falling below 0, where negative pre-activations would pass."""
        super().after_step(losses)
        self.threshold.clamp_(min=0)


class _Jump(torch.autograd.Function):
    """`x` where it is above the threshold, and how many are, by token and by latent; with a gradient for the threshold.

    That of the step function is a kernel estimate: a rectangle of width `bandwidth` around the threshold. `x` has a
    token's latents in its last axis, and each latent a threshold; or `x` has the entries `found`, each with its own.
    Masks have the type of `x`: they are made, multiplied by and summed in half the time of booleans.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        threshold: Tensor,
        bandwidth: float,
        ste_to_input: bool,
        found: sparse.Entries | None,
        d_sae: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth, ctx.ste_to_input, ctx.found = bandwidth, ste_to_input, found
        above = torch.gt(x, threshold, out=torch.empty_like(x))
        counted = torch.promote_types(x.dtype, torch.float32)
        if found is None:
            l0, fired = above.sum(-1, dtype=counted), above.reshape(-1, d_sae).sum(0, dtype=torch.float32)
        else:
            l0, fired = found.sum_by_token(above.to(counted)), found.sum_by_latent(above.float(), d_sae)
        ctx.mark_non_differentiable(fired)
        return above.mul_(x), l0, fired

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_f: Tensor, grad_l0: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, threshold = ctx.saved_tensors
        near = ((x - threshold) / ctx.bandwidth).abs_().lt_(0.5)
        by_entry = grad_l0[..., None] if ctx.found is None else grad_l0.index_select(0, ctx.found.tokens)
        grad_x = torch.gt(x, threshold, out=torch.empty_like(x)).mul_(grad_f)
        if ctx.ste_to_input or ctx.found is not None:
            jump = (grad_f * threshold + by_entry) * near / ctx.bandwidth
            if ctx.ste_to_input:
                grad_x += jump
            if ctx.found is not None:
                return grad_x, -jump, None, None, None, None
        # By latent: of the window's pre-activations the number, each times its token's gradient, and the gradients.
        near, wide = near.flatten(0, -2), threshold.dtype
        of_l0 = grad_l0.flatten().to(near.dtype) @ near
        of_f = near.mul_(grad_f.flatten(0, -2)).sum(0, dtype=wide)
        return grad_x, (of_f * threshold + of_l0.to(wide)) / -ctx.bandwidth, None, None, None, None
