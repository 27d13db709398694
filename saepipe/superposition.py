"""Activations whose features are known, more than there are dimensions, and how much of them an SAE finds.

Such as `data = Superposition(Features.drawn(1024, 128, seed=0), seed=0, batch_tokens=1024)`, of which an SAE trains on
`data.batch(0).x`, `data.batch(1).x` and so on, and `score(sae, data)` then tells how much of the features it found.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from saepipe import sparse
from saepipe.known_features import Features, normal, uniform
from saepipe.matching import match
from saepipe.metrics import ReconstructionFit
from saepipe.permutation import derive_key

__all__ = ["HELD_OUT", "Batch", "Features", "Superposition", "cosines", "score"]

HELD_OUT = 2**40
"""Number of the first batch that `score` takes; training counts from 0."""


@dataclass(frozen=True)
class Batch:
    """Activations, and what they are made of."""

    x: Float[Tensor, "token d"]
    """Activations."""
    magnitudes: Float[Tensor, "token feature"]
    """What each feature fires with, 0 where it does not."""


@dataclass(frozen=True)
class Superposition:
    """Batches of activations; any of them can be drawn by itself, and is the same in every process."""

    features: Features
    """What they are made of."""
    seed: int
    """Another seed draws other batches."""
    batch_tokens: int
    """Tokens of a batch."""

    def batch(self, number: int) -> Batch:
        """Draw a batch: a pure function of the features, the seed, the batch's size and its number."""
        features, tokens = self.features, self.batch_tokens
        fires = self._fires(number)
        places = fires.flatten().nonzero().squeeze(1)
        which, per_token = places % fires.shape[1], fires.sum(1)
        noise = normal(self._key("magnitudes", number), len(places))
        values = (features.mean[which] + features.std[which] * noise).abs()
        # The sparse sum is as exact as a product with zeros, and for 16k features many times as fast.
        x = sparse.decode(values, which, features.directions, per_token.cumsum(0) - per_token) + features.bias
        magnitudes = torch.zeros(tokens * fires.shape[1]).index_put_((places,), values).view(fires.shape)
        return Batch(x, magnitudes)

    def _key(self, what: str, number: int) -> int:
        return derive_key("superposition", self.seed, self.batch_tokens, what, number)

    def _fires(self, number: int) -> Tensor:
        """Which features fire on which tokens."""
        features, tokens = self.features, self.batch_tokens
        n, rank = features.factor.shape
        u = uniform(self._key("fires", number), tokens * n).view(tokens, n)
        low, high, deciding = features.bounds
        fires = u < features.probability
        roots, *later = features.generations
        if rank:
            # Given what they share, correlated features fire independently: so no feature needs a normal of its own.
            factor = features.factor[roots].double()
            shared = normal(self._key("shared", number), tokens * rank).view(tokens, rank).double()
            level = torch.special.ndtri(features.probability[roots].double()) + shared @ factor.T
            own = (1 - factor.square().sum(1)).sqrt()
            fires[:, roots] = u[:, roots] < torch.special.ndtr((level / own).float())
        for generation in later:
            drawn = u[:, deciding[generation]]
            inside = (drawn >= low[generation]) & (drawn < high[generation])
            fires[:, generation] = inside & fires[:, features.parent[generation]]
        return fires


@runtime_checkable
class Autoencoder(Protocol):
    """What `score` asks of an SAE, which those of other libraries have too."""

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d"]: ...

    def encode(self, x: Tensor, /) -> Tensor: ...

    def decode(self, f: Tensor, /) -> Tensor: ...


def cosines(W_dec: Float[Tensor, "d_sae d"], features: Features) -> Float[Tensor, "d_sae feature"]:
    """Cosine similarity of each latent's decoder row and each feature's direction, in float64."""
    return functional.normalize(W_dec.detach().cpu().double(), dim=1) @ features.directions.double().T


@torch.no_grad()
def score(sae: Autoencoder, data: Superposition, *, tokens: int = 100_000) -> dict[str, float]:
    """Compare an SAE with the truth, on batches that no training drew.

    Args:
        sae: An SAE of saepipe, or another with `encode`, `decode` and `W_dec`.
        data: Where the batches come from.
        tokens: How many to measure on, in whole batches.

    Returns:
        mcc: Mean absolute cosine of latents and features that are paired so that it is the largest.
        f1: Mean over latents of the F1 score at which a latent tells whether its feature, that of the largest absolute
            cosine, fires; 0 for a latent that never fires.
        precision, recall: What f1 is the harmonic mean of, also means over latents.
        uniqueness: Features that are some latent's, per latent.
        explained_variance: As `saepipe.metrics` has it.
        l0: Latents that fire on a token.
        true_l0: Features that fire on a token.
        dead: Share of the latents that never fired.

    Source: Chanin and Garriga-Alonso 2026 (arXiv 2602.14687), the definitions of SAELens.
    """
    similarity = cosines(sae.W_dec, data.features).abs()
    rows, columns = match(similarity.numpy())
    nearest = similarity.argmax(1)
    fit = ReconstructionFit(data.features.directions.shape[1])
    hits, fired = torch.zeros(len(nearest), dtype=torch.int64), torch.zeros(len(nearest), dtype=torch.int64)
    due = torch.zeros(similarity.shape[1], dtype=torch.int64)
    for number in range(-(-tokens // data.batch_tokens)):
        batch = data.batch(HELD_OUT + number)
        x = batch.x.to(sae.W_dec.device)
        f = sae.encode(x)
        fit.update(x, sae.decode(f))
        latent_fires, feature_fires = (f != 0).cpu(), batch.magnitudes > 0
        hits += (latent_fires & feature_fires[:, nearest]).sum(0)
        fired += latent_fires.sum(0)
        due += feature_fires.sum(0)
    return {
        "mcc": float(similarity[rows, columns].mean()),
        "f1": _mean_share(2 * hits, fired + due[nearest]),
        "precision": _mean_share(hits, fired),
        "recall": _mean_share(hits, due[nearest]),
        "uniqueness": len(nearest.unique()) / len(nearest),
        "explained_variance": fit.compute()["explained_variance"],
        "l0": int(fired.sum()) / fit.rows,
        "true_l0": int(due.sum()) / fit.rows,
        "dead": int((fired == 0).sum()) / len(fired),
    }


def _mean_share(part: Int[Tensor, " d_sae"], whole: Int[Tensor, " d_sae"]) -> float:
    return float((part.double() / whole.clamp(min=1)).mean())
