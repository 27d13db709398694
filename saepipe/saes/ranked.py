"""What the architectures share that keep the largest latents, and have no sparsity penalty."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from saepipe import sparse
from saepipe.errors import UserError
from saepipe.keys import key
from saepipe.saes.base import SAE, Pass, SAEConfig, Step
from saepipe.saes.config import DEAD_METHODS

RANKED_DEAD_METHODS = (*DEAD_METHODS, "auxk")


@dataclass
class RankedConfig(SAEConfig):
    """Their keys."""

    rescale_acts_by_decoder_norm: bool = True
    """Rank latents by pre-activation times norm of the decoder row, since the norms drift in training."""
    dead_method: str = key("auxk", choices=RANKED_DEAD_METHODS)
    """auxk: dead latents learn to predict what the live ones leave over; or none, ghost or resample, as everywhere."""
    aux_loss_coefficient: float = key(1.0, least=0)
    """Weight of the auxiliary term of auxk."""

    def holds(self, k: float, d_in: int) -> int:
        """Return the width of the SAE, which must hold k latents."""
        d_sae = super().resolve(d_in)
        if k > d_sae:
            raise UserError(f"sae.k={k:g} is more than the {d_sae} latents there are; give at most {d_sae}")
        return d_sae


@dataclass
class Kept:
    """The latents of a batch that are kept."""

    values: Float[Tensor, "*kept"]
    """What they were ranked by."""
    indices: Int[Tensor, "*kept"]
    """Which they are."""
    offsets: Int[Tensor, " token"] | None = None
    """Number of each token's first; None: they are [token, k]."""
    smallest: Float[Tensor, ""] | None = None
    """The smallest value that is kept of the global batch, infinite where none is; None: each token has its own."""


class RankedSAE(SAE):
    """An autoencoder whose training step is sparse after the encoder's product.

    Source of the auxiliary term: Gao et al. 2024 (arXiv 2406.04093). As in SAELens, and unlike the paper, the error is
    not divided by the variance, k_aux is d_in // 2, and the term shrinks where fewer latents than k_aux are dead.
    """

    sparse_step = True

    @abstractmethod
    def _keep(self, ranked: Float[Tensor, "token d_sae"], step: Step) -> Kept:
        """Choose the largest latents of a training batch, without a gradient."""

    def _pass(self, centred: Tensor, target: Tensor, step: Step) -> Pass:
        """The auxiliary term is the error of what the dead latents make of the remaining error."""
        with torch.no_grad():
            norm = self._decoder_norm()
            kept = self._keep(self._ranked(centred, norm), step)
            # Back to the encoder's own pre-activations: the decoder's norm that ranked them cancels in W_dec.
            pre = kept.values.to(norm.dtype) / norm[kept.indices]
        x, rows = centred.detach(), self.W_enc.T
        f = torch.relu(sparse.select(pre, kept.indices, x, rows, self.b_enc, kept.offsets, self._input_centre))
        reconstruction, terms = self._decoded(f, kept, target)
        if self.cfg.dead_method == "auxk":
            residual = (target - reconstruction).detach()
            terms["auxiliary_reconstruction_loss"] = self._aux(centred, residual, step.find_dead(), norm)
        active = (f.detach() > 0).to(torch.float32).flatten()
        fired = active.new_zeros(self.d_sae).index_add_(0, kept.indices.flatten(), active)
        return Pass(reconstruction, fired, terms, self._notes(kept))

    def _decoded(self, f: Tensor, kept: Kept, target: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the reconstruction, and terms of what else the kept latents reconstruct; none by themselves."""
        return sparse.decode(f, kept.indices, self.W_dec, kept.offsets) + self.b_dec, {}

    def _notes(self, kept: Kept) -> dict[str, Tensor]:
        """Return what `after_step` and the logs want to know of the kept latents; nothing by itself."""
        return {}

    def _aux(self, centred: Tensor, residual: Tensor, dead: Tensor, norm: Tensor) -> Tensor:
        """AuxK: the top k_aux dead latents predict the residual, without a bias.

        Products are dense over the dead latents alone, which in a healthy run are few.
        """
        if len(dead) == 0:
            return residual.new_zeros(())
        k_aux = max(self.d_in // 2, 1)
        rows = self.W_dec.index_select(0, dead)
        z = self._hidden_pre_of(centred, dead)
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

    def _ranked(self, centred: Tensor, norm: Tensor) -> Tensor:
        """Do as `_hidden_pre`, without a gradient."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return super()._hidden_pre(centred)
        kind = centred.device.type
        # At once into the type that autocast multiplies in: a product in float32 would be written, and read again.
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.W_enc.dtype
        return functional.linear(centred, sparse.scaled(self.W_enc.T, norm, dtype), self.b_enc * norm)

    def _reconstruct(self, f: Tensor) -> Tensor:
        return super()._reconstruct(f / self._decoder_norm() if self.cfg.rescale_acts_by_decoder_norm else f)

    def directions(self, latents: Sequence[int] | slice = slice(None)) -> Tensor:
        """Undo the decoder's norm, as `decode` does."""
        return super().directions(latents) / self._decoder_norm()[latents, None]

    def folded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Fold the decoder's norms as well, after which nothing needs rescaling."""
        values, weights = super().folded()
        norm = self._decoder_norm().detach().double()
        weights["W_enc"] = weights["W_enc"] * norm
        weights["b_enc"] = weights["b_enc"] * norm
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
        return values, weights
