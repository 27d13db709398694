"""Features that are known: directions, how often each fires, and what it goes with.

`Features.drawn` draws a set in the manner of SynthSAEBench (arXiv 2602.14687), `Features.toy_tree` is the one of the
Matryoshka paper (arXiv 2503.17547). `saepipe.superposition` draws activations that are made of them.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from saepipe.errors import UserError
from saepipe.permutation import derive_key


def uniform(key: int, n: int) -> Float[Tensor, " n"]:
    """Draw `n` numbers between 0 and 1, the same on every machine and with every version.

    NumPy promises its bit generators' streams, and no more than those; a number is 23 bits of Philox's and a half,
    which float32 holds exactly, so that none is 0 or 1.

    Args:
        key: 64-bit key, from `derive_key`.
        n: How many.
    """
    bits = np.random.Philox(key=key).random_raw(-(-n // 2)).astype("<u8", copy=False).view("<u4")[:n]
    return torch.from_numpy((bits >> np.uint32(9)).astype(np.float32)).add_(0.5).mul_(2.0**-23)


def normal(key: int, n: int) -> Float[Tensor, " n"]:
    """Draw `n` numbers of the standard normal distribution, likewise, but for the last bits of the logarithms."""
    return torch.special.ndtri(uniform(key, n).double()).float()


@dataclass(frozen=True)
class Features:
    """What activations are made of, and when each of it fires."""

    directions: Float[Tensor, "feature d"]
    """Unit vectors."""
    probability: Float[Tensor, " feature"]
    """How often a feature fires of the times that its parent does; without a parent, of all."""
    parent: Int[Tensor, " feature"]
    """Number of the parent, without which a feature never fires, or -1; parents come before their children."""
    exclusive: Bool[Tensor, " feature"]
    """Whether a child never fires together with its exclusive siblings."""
    factor: Float[Tensor, "feature rank"]
    """Features without a parent fire where a normal variable is large, and the scalar product of two rows is their
    variables' correlation (a Gaussian copula). Rows of features with a parent do not matter."""
    mean: Float[Tensor, " feature"]
    """Magnitude at which a feature fires, mean ..."""
    std: Float[Tensor, " feature"]
    """... and standard deviation of a normal distribution, of which the absolute value is taken."""
    bias: Float[Tensor, " d"]
    """Added to every activation."""

    def __post_init__(self) -> None:
        """Check what would silently give other probabilities than asked for."""
        number = torch.arange(len(self.parent))
        if not bool(((self.parent >= -1) & (self.parent < number)).all()):
            raise UserError("parent names a feature that does not come before its child; number parents first")
        if not bool(((self.probability > 0) & (self.probability <= 1)).all()):
            raise UserError(f"probability holds {self.probability.min():g}; give values above 0, up to 1")
        if self.factor.shape[1] and float(self.factor.norm(dim=1).max()) >= 1:
            raise UserError(f"factor has a row of norm {self.factor.norm(dim=1).max():.3g}; lower it below 1")
        crowded = float(self.bounds[1].max())
        if crowded > 1 + 1e-6:
            raise UserError(f"probability of exclusive siblings adds up to {crowded:.3g}; lower it to at most 1")

    @classmethod
    def drawn(
        cls,
        n_features: int,
        d: int,
        *,
        seed: int,
        probability: tuple[float, float] = (0.4, 5e-4),
        zipf: float = 0.5,
        roots: int = 8,
        branching: int = 4,
        depth: int = 3,
        exclusive: bool = True,
        rank: int = 25,
        correlation: float = 0.1,
        magnitude: tuple[float, float] = (5.0, 4.0),
        spread: float = 0.5,
        bias: float = 1.0,
    ) -> "Features":
        """Draw features in the manner of SynthSAEBench, whose own values the defaults are, but for the number of trees.

        Args:
            n_features: How many; the first are the roots, then their children, then theirs, then those without a tree.
            d: Width of the activations.
            seed: The same seed draws the same features.
            probability: Share of all tokens on which the most frequent and the rarest feature fires. A child's
                holds as far as its parent and siblings leave room for it.
            zipf: Exponent with which it falls from one to the other by the number of the feature.
            roots: Trees of features.
            branching: Children of each feature that has any.
            depth: Generations below the roots.
            exclusive: Whether only one of a feature's children fires at a time.
            rank: Rank of the correlation of features without a parent; 0 leaves them independent.
            correlation: Standard deviation of the entries of `factor`.
            magnitude: Mean magnitude of the most frequent and of the rarest feature.
            spread: Scale of the magnitudes' standard deviations.
            bias: Norm of the bias.

        Source: Chanin and Garriga-Alonso 2026 (arXiv 2602.14687). Directions are random, without their steps towards
        orthogonal ones; children follow their parent alone, where theirs correlate with other features too.
        """
        generations = [roots * branching**generation for generation in range(depth + 1)]
        if sum(generations) > n_features:
            raise UserError(
                f"n_features={n_features} is fewer than the {sum(generations)} of the trees; lower roots or depth"
            )
        parent = torch.full((n_features,), -1)
        parent[roots : sum(generations)] = torch.arange(sum(generations[:-1])).repeat_interleave(branching)
        falling = torch.arange(1, n_features + 1, dtype=torch.float64) ** -zipf
        share = (falling - falling[-1]) / (falling[0] - falling[-1]).clamp(min=1e-12)
        marginal = probability[1] + (probability[0] - probability[1]) * share
        factor = correlation * normal(derive_key("factor", seed), n_features * rank).view(n_features, rank)
        norm = factor.norm(dim=1, keepdim=True)
        return cls(
            directions=functional.normalize(normal(derive_key("directions", seed), n_features * d).view(-1, d), dim=1),
            probability=_given_parent(marginal, generations, branching, exclusive).float(),
            parent=parent,
            exclusive=torch.full((n_features,), exclusive),
            factor=factor * (0.99**0.5 / norm.clamp(min=0.99**0.5)),
            mean=torch.linspace(*magnitude, n_features),
            std=spread * (1 + normal(derive_key("spread", seed), n_features)).abs(),
            bias=bias * functional.normalize(normal(derive_key("bias", seed), d), dim=0),
        )

    @classmethod
    def toy_tree(cls, *, seed: int) -> "Features":
        """Draw 20 orthogonal directions in 20 dimensions: 3 parents, 3 exclusive children of each, 8 on their own.

        A parent fires on 15 % of the tokens, a child on 20 % of its parent's, each of the others on 5 %, all of them
        with magnitude 1: 1.12 features on a token.

        Source: the toy model of Nabeshima's Matryoshka SAEs, which Bussmann et al. 2025 (arXiv 2503.17547) report.
        """
        square = normal(derive_key("directions", seed), 400).view(20, 20)
        return cls(
            directions=torch.linalg.qr(square.double()).Q.T.float().contiguous(),
            probability=torch.tensor([0.15] * 3 + [0.2] * 9 + [0.05] * 8),
            parent=torch.tensor([-1] * 3 + [0] * 3 + [1] * 3 + [2] * 3 + [-1] * 8),
            exclusive=torch.ones(20, dtype=torch.bool),
            factor=torch.zeros(20, 0),
            mean=torch.ones(20),
            std=torch.zeros(20),
            bias=torch.zeros(20),
        )

    @cached_property
    def generations(self) -> list[Int[Tensor, " _"]]:
        """Features without a parent, their children, and so on."""
        depth = torch.zeros_like(self.parent)
        for feature, parent in enumerate(self.parent.tolist()):
            depth[feature] = depth[parent] + 1 if parent >= 0 else 0
        return [(depth == here).nonzero().squeeze(1) for here in range(int(depth.max()) + 1)]

    @cached_property
    def marginal(self) -> Float[Tensor, " feature"]:
        """How often each feature fires, of all tokens; the sum is the true L0."""
        marginal = self.probability.clone()
        for generation in self.generations[1:]:
            marginal[generation] *= marginal[self.parent[generation]]
        return marginal

    @cached_property
    def bounds(self) -> tuple[Float[Tensor, " feature"], Float[Tensor, " feature"], Int[Tensor, " feature"]]:
        """A child fires where a uniform number is from the first up to the second, and which feature's number it is.

        Exclusive siblings share a number and divide its range, so that each keeps its probability.
        """
        low, deciding = torch.zeros(len(self.parent), dtype=torch.float64), torch.arange(len(self.parent))
        taken: dict[int, tuple[int, float]] = {}
        for feature, (parent, exclusive) in enumerate(zip(self.parent.tolist(), self.exclusive.tolist(), strict=True)):
            if parent >= 0 and exclusive:
                first, used = taken.get(parent, (feature, 0.0))
                low[feature], deciding[feature] = used, first
                taken[parent] = first, used + float(self.probability[feature])
        return low.float(), (low + self.probability).float(), deciding


def _given_parent(marginal: Tensor, generations: list[int], branching: int, exclusive: bool) -> Tensor:
    """Probabilities given the parent, from those of all tokens that are wanted.

    What exclusive siblings want together may be more than there is. They get as much as if each drew by itself and one
    of those that fire were kept, which is how SynthSAEBench draws them.
    """
    given, done = marginal.clone(), marginal.clone()
    start, parents = generations[0], slice(0, generations[0])
    for size in generations[1:]:
        wanted = marginal[start : start + size].view(-1, branching)
        share = (wanted / done[parents, None]).clamp(max=1)
        if exclusive:
            share = share * ((1 - (1 - share).prod(1)) / share.sum(1))[:, None]
        here = slice(start, start + size)
        given[here], done[here] = share.flatten(), (share * done[parents, None]).flatten()
        start, parents = start + size, here
    return given
