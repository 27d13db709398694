"""TopK: the k largest pre-activations of a token, and no sparsity penalty."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from saepipe import sparse
from saepipe.errors import UserError
from saepipe.keys import key
from saepipe.saes.base import SAE, Pass, SAEConfig

DEAD_METHODS = ("none", "auxk")


@dataclass
class TopKConfig(SAEConfig):
    """Keys of the TopK architecture."""

    architecture: str = "topk"
    """Name of this file."""
    k: int = key(32, least=1)
    """Latents that may be active on a token."""
    rescale_acts_by_decoder_norm: bool = True
    """Rank latents by pre-activation times norm of the decoder row, since the norms drift in training."""
    dead_method: str = key("auxk", choices=DEAD_METHODS)
    """none, or auxk: dead latents learn to predict what the live ones leave over."""
    aux_loss_coefficient: float = key(1.0, least=0)
    """Weight of the auxiliary term of auxk."""

    def resolve(self, d_in: int) -> int:
        """Width of the SAE, which must hold k latents."""
        d_sae = super().resolve(d_in)
        if self.k > d_sae:
            raise UserError(f"sae.k={self.k} is more than the {d_sae} latents there are; give at most {d_sae}")
        return d_sae


class TopKSAE(SAE):
    """TopK autoencoder whose training step is sparse after the encoder's product.

    Source: Gao et al. 2024 (arXiv 2406.04093). As in SAELens, and unlike the paper, the error is not divided by the
    variance, k_aux is d_in // 2, and the auxiliary term shrinks where fewer latents than k_aux are dead.
    """

    config_class: ClassVar[type[SAEConfig]] = TopKConfig

    @property
    def revives(self) -> bool:
        """Whether the auxiliary term is on."""
        return self.cfg.dead_method == "auxk"

    def _pass(self, centred: Tensor, target: Tensor, *, step: int, dead: Tensor) -> Pass:
        """The auxiliary term is the error of what the dead latents make of the remaining error."""
        with torch.no_grad():
            norm = self._decoder_norm()
            top = self._hidden_pre(centred).topk(self.cfg.k, sorted=False)
            # Back to the encoder's own pre-activations: the decoder's norm that ranked them cancels in W_dec.
            pre = top.values.to(norm.dtype) / norm[top.indices]
        f = torch.relu(sparse.select(pre, top.indices, centred, self.W_enc.T, self.b_enc))
        reconstruction = sparse.decode(f, top.indices, self.W_dec) + self.b_dec
        terms = {}
        if self.cfg.dead_method == "auxk":
            terms["aux"] = self._aux(centred, (target - reconstruction).detach(), dead, norm)
        active = (f.detach() > 0).to(torch.float32).flatten()
        fired = active.new_zeros(self.d_sae).index_add_(0, top.indices.flatten(), active)
        return Pass(reconstruction, fired, terms)

    def _aux(self, centred: Tensor, residual: Tensor, dead: Tensor, norm: Tensor) -> Tensor:
        """AuxK: the top k_aux dead latents predict the residual, without a bias.

        Products are dense over the dead latents alone, which in a healthy run are few.
        """
        if len(dead) == 0:
            return residual.new_zeros(())
        k_aux = max(self.d_in // 2, 1)
        rows = self.W_dec.index_select(0, dead)
        z = functional.linear(centred, self.W_enc.T.index_select(0, dead), self.b_enc.index_select(0, dead))
        if len(dead) > k_aux:
            indices = (z.detach() * norm[dead]).topk(k_aux, sorted=False).indices
            z = z * torch.zeros_like(z).scatter_(1, indices, 1.0)
        squared = (residual - z @ rows).square().sum(-1).mean()
        return self.cfg.aux_loss_coefficient * min(len(dead) / k_aux, 1.0) * squared

    def _decoder_norm(self) -> Tensor:
        """What latents are rescaled by before they are ranked."""
        if self.cfg.rescale_acts_by_decoder_norm:
            return self.W_dec.norm(dim=1).clamp_min(1e-8)
        return torch.ones_like(self.b_enc)

    def _hidden_pre(self, centred: Tensor) -> Tensor:
        if not self.cfg.rescale_acts_by_decoder_norm:
            return super()._hidden_pre(centred)
        # Into the weights, as an export does: they are smaller than [token, d_sae], and bfloat16 rounds once.
        norm = self._decoder_norm()
        return functional.linear(centred, self.W_enc.T * norm[:, None], self.b_enc * norm)

    def _activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        top = hidden_pre.topk(self.cfg.k, sorted=False)
        return torch.zeros_like(hidden_pre).scatter(-1, top.indices, torch.relu(top.values))

    def _reconstruct(self, f: Tensor) -> Tensor:
        return super()._reconstruct(f / self._decoder_norm() if self.cfg.rescale_acts_by_decoder_norm else f)

    def folded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fold the decoder's norms as well, after which nothing needs rescaling."""
        values, weights = super().folded()
        norm = self._decoder_norm().detach().double()
        weights["W_enc"] = weights["W_enc"] * norm
        weights["b_enc"] = weights["b_enc"] * norm
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
        return {**values, "k": self.cfg.k, "rescale_acts_by_decoder_norm": False}, weights
