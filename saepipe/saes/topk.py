"""TopK: the k largest pre-activations of a token, and no sparsity penalty."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from saepipe import sparse
from saepipe.keys import key
from saepipe.saes.base import SAEConfig, Step
from saepipe.saes.ranked import Kept, RankedConfig, RankedSAE


@dataclass
class TopKConfig(RankedConfig):
    """Keys of the TopK architecture."""

    architecture: str = "topk"
    """Name of this file."""
    k: int = key(32, least=1)
    """Latents that may be active on a token."""

    def resolve(self, d_in: int) -> int:
        """Width of the SAE, which must hold k latents."""
        return self.holds(self.k, d_in)


class TopKSAE(RankedSAE):
    """TopK autoencoder.

    Source: Gao et al. 2024 (arXiv 2406.04093).
    """

    config_class: ClassVar[type[SAEConfig]] = TopKConfig

    def _keep(self, ranked: Tensor, step: Step) -> Kept:
        return Kept(*sparse.largest(ranked, self.cfg.k))

    def _activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        top = hidden_pre.topk(self.cfg.k, sorted=False)
        return torch.zeros_like(hidden_pre).scatter(-1, top.indices, torch.relu(top.values))

    def folded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Say how many latents an export keeps."""
        values, weights = super().folded()
        return {**values, "k": self.cfg.k, "rescale_acts_by_decoder_norm": False}, weights
