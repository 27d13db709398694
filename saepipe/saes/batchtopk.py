"""BatchTopK: the largest pre-activations of a whole batch, k per token on average; afterwards a threshold."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe.keys import key
from saepipe.saes.base import Losses, SAEConfig
from saepipe.saes.ranked import Kept, RankedConfig, RankedSAE

_SAMPLE_STEP = 257  # a prime, so that a sample of the batch does not keep to some latents


@dataclass
class BatchTopKConfig(RankedConfig):
    """Keys of the BatchTopK architecture."""

    architecture: str = "batchtopk"
    """Name of this file."""
    k: float = key(32.0, above=0)
    """Active latents per token, mean over the batch."""
    topk_threshold_lr: float = key(0.01, above=0, most=1)
    """Weight of a batch in the running mean of the smallest activation that was kept: the threshold of an export."""

    def resolve(self, d_in: int) -> int:
        """Width of the SAE, which must hold k latents."""
        return self.holds(self.k, d_in)


class BatchTopKSAE(RankedSAE):
    """BatchTopK autoencoder: trained on the largest latents of a batch, encodes (and is exported) as a JumpReLU.

    Source: Bussmann et al. 2024 (arXiv 2412.06410). Where several are equal to the smallest that is kept, all of them
    are, so that the choice does not depend on the order of the tokens.
    """

    config_class: ClassVar[type[SAEConfig]] = BatchTopKConfig
    threshold: Tensor

    def __init__(self, cfg: SAEConfig, d_in: int, d_out: int | None = None) -> None:
        super().__init__(cfg, d_in, d_out)
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))

    def _keep(self, ranked: Tensor) -> Kept:
        tokens = len(ranked)
        places = largest(ranked.flatten(), int(self.cfg.k * tokens))
        indices, per_token = places % self.d_sae, torch.bincount(places // self.d_sae, minlength=tokens)
        return Kept(ranked.flatten()[places], indices, per_token.cumsum(0) - per_token)

    def _notes(self, kept: Kept) -> dict[str, Tensor]:
        """The smallest activation that is kept; 0 where none is, since all of them are positive."""
        return {"topk_threshold": kept.values.min() if len(kept.values) else kept.values.new_zeros(())}

    @torch.no_grad()
    def after_step(self, losses: Losses) -> None:
        """Move the threshold towards the smallest activation that was kept."""
        smallest = losses.notes["topk_threshold"].to(self.threshold.dtype)
        moved = self.threshold.lerp(smallest, self.cfg.topk_threshold_lr)
        self.threshold.copy_(torch.where(smallest > 0, moved, self.threshold))

    def _activate(self, hidden_pre: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_sae"]:
        return hidden_pre * (hidden_pre > self.threshold.to(hidden_pre.dtype))

    def folded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Export as a JumpReLU with one threshold for all latents."""
        values, weights = super().folded()
        weights["threshold"] = self.threshold.double().expand(self.d_sae)
        return {**values, "architecture": "jumprelu"}, weights


def largest(values: Float[Tensor, " n"], count: int) -> Int[Tensor, " kept"]:
    """Return where the `count` largest positive values are, in ascending order; all that equal the smallest of them.

    Sorting out those below a pivot first is exact and three times as fast on a CPU as a search in all of them: the
    pivot is a value that a sample says is exceeded by somewhat more than `count`.
    """
    sample = values[::_SAMPLE_STEP]
    wanted = int(1.3 * count / _SAMPLE_STEP) + 8
    pivot = sample.topk(wanted).values[-1] if wanted <= len(sample) else values.new_zeros(())
    candidates = (values >= pivot.clamp(min=0)).logical_and_(values > 0).nonzero().squeeze(1)
    if len(candidates) < count and pivot > 0:
        candidates = (values > 0).nonzero().squeeze(1)
    if len(candidates) <= count or not count:
        return candidates[:count]
    found = values[candidates]
    return candidates[found >= found.topk(count, sorted=False).values.min()]
