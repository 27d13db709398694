"""Which latents tell two sets of texts apart, and how sure that is.

A text is one observation, however long it is: its tokens are not independent. Of each text a latent gives one number
(`Summary`), and the sets are compared by

- the AUROC, the chance that a text of A has a larger number than one of B (equal ones count half), with an interval by
  Newcombe's method 5 (Statistics in Medicine 2006, 25:559), which does not shrink to a point where the sets are parted
  without a fault;
- the difference of the means, with an interval by the bootstrap over texts (percentiles).

These intervals are for a latent that was chosen beforehand. Of thousands of latents some differ by chance, and the best
of them look better than they are. So each latent also has a p-value that holds for all of them together: the share of
random partitions of the same texts in which any latent at all separates as well (Westfall and Young 1993). A latent
that counts should be tested again on texts of which none was used to find it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch
from jaxtyping import Float
from torch import Tensor

from saepipe.errors import UserError, unknown
from saepipe.hooked import HookedSAETransformer
from saepipe.reading import Reading, activations
from saepipe.saes.base import SAE

MEASURES = ("mean", "max")
_CHUNK = 1 << 23
"""Most numbers in a table of a step over all latents; torch takes quantiles of 16 million at most."""


@dataclass(frozen=True)
class Summary:
    """What the latents do in each text of a set."""

    values: Float[Tensor, "text d_sae"]
    """Mean or largest activation over the tokens that count."""
    active: Float[Tensor, "text d_sae"]
    """1 where the latent is active on one of them, else 0."""

    @classmethod
    def measure(cls, model: HookedSAETransformer, sae: SAE, reading: Reading, measure: str = "mean") -> "Summary":
        """Read texts and sum each of them up.

        Args:
            model: The language model.
            sae: The SAE.
            reading: What to read, from `Texts.batches`.
            measure: `mean` or `max`, over the tokens of a text.

        Raises:
            UserError: There is no such measure.
        """
        if measure not in MEASURES:
            raise unknown("measure", measure, MEASURES)
        values, active = [], []
        for read in reading:
            f = activations(model, sae, read)
            largest = f.amax(1)
            counted = read.counted.sum(1, keepdim=True).to(f)
            values.append((largest if measure == "max" else f.sum(1) / counted).float().cpu())
            active.append((largest > 0).float().cpu())
        return cls(torch.cat(values), torch.cat(active))


@dataclass(frozen=True)
class Separation:
    """How each latent separates set A from set B."""

    auroc: Float[Tensor, " d_sae"]
    """Above 0.5 where texts of A have more of the latent."""
    auroc_interval: Float[Tensor, "2 d_sae"]
    """Lower and upper end."""
    difference: Float[Tensor, " d_sae"]
    """Mean over the texts of A less that over those of B, in the latents' units."""
    difference_interval: Float[Tensor, "2 d_sae"]
    """Lower and upper end."""
    p_adjusted: Float[Tensor, " d_sae"]
    """How often chance gives any latent of the SAE an AUROC as far from 0.5; at least 1 / (1 + resamples)."""

    def best(self, n: int) -> list[int]:
        """Return the latents whose AUROC is farthest from 0.5, of equal ones those that differ most by their means."""
        distance = [round(abs(auroc - 0.5), 6) for auroc in self.auroc.tolist()]
        difference = self.difference.abs().tolist()
        order = sorted(range(len(distance)), key=lambda latent: (-distance[latent], -difference[latent]))
        return [latent for latent in order[:n] if distance[latent]]


def separate(
    a: Float[Tensor, "text_a d_sae"],
    b: Float[Tensor, "text_b d_sae"],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Separation:
    """Compare two sets of texts.

    Args:
        a: `Summary.values` of set A.
        b: The same of set B.
        confidence: How often an interval is to hold the truth, of a latent that was chosen beforehand.
        resamples: Times that the bootstrap draws texts anew, and that texts are parted anew for `p_adjusted`.
        seed: Makes both repeatable.

    Raises:
        UserError: A set has fewer than two texts, or a value has no meaning.
    """
    if not 0 < confidence < 1:
        raise UserError(f"confidence={confidence} is no share below 1; give one such as 0.95")
    if resamples < 1:
        raise UserError(f"resamples={resamples} draws nothing; give at least 1")
    if a.shape[1] != b.shape[1]:
        raise UserError(f"a has {a.shape[1]} latents and b has {b.shape[1]}; give sets of the same SAE")
    for name, values in (("A", a), ("B", b)):
        if len(values) < 2:
            raise UserError(f"set {name} holds {len(values)} text; give at least two, since texts are what is compared")
    generator = torch.Generator().manual_seed(seed)
    weights_a, weights_b = (_drawn(len(values), resamples, generator) for values in (a, b))
    parted = _parted(len(a), len(b), resamples, generator)
    auroc, ends, at_random = [], [], torch.zeros(resamples)
    tail = (1 - confidence) / 2
    for part in _parts(a.shape[1], resamples + len(a) + len(b)):
        drawn = weights_a @ a[:, part] - weights_b @ b[:, part]
        ends.append(torch.stack([drawn.quantile(tail, dim=0), drawn.quantile(1 - tail, dim=0)]))
        ranks = _ranks(torch.cat([a[:, part], b[:, part]]))
        auroc.append(_auroc(ranks[: len(a)].sum(0), len(a), len(b)))
        others = _auroc(parted @ ranks, len(a), len(b))
        at_random = torch.maximum(at_random, (others - 0.5).abs().amax(1))
    found = torch.cat(auroc)
    at_least = at_random.sort().values
    below = torch.searchsorted(at_least, (found - 0.5).abs() - 1e-6)
    return Separation(
        auroc=found,
        auroc_interval=torch.stack(
            [
                _newcombe(found, len(a), len(b), confidence),
                1 - _newcombe(1 - found, len(a), len(b), confidence),
            ]
        ),
        difference=a.mean(0) - b.mean(0),
        difference_interval=torch.cat(ends, 1),
        p_adjusted=(1 + resamples - below) / (1 + resamples),
    )


def _parts(n: int, height: int) -> Iterator[slice]:
    """Cut the latents so that a table of such a height stays small."""
    width = max(1, _CHUNK // height)
    return (slice(start, start + width) for start in range(0, n, width))


def _drawn(n: int, resamples: int, generator: torch.Generator) -> Float[Tensor, "resample text"]:
    """Shares of the texts in sets that are drawn from them with replacement."""
    drawn = torch.randint(n, (resamples, n), generator=generator)
    return torch.zeros(resamples, n).scatter_add_(1, drawn, torch.full((resamples, n), 1 / n))


def _parted(n_a: int, n_b: int, resamples: int, generator: torch.Generator) -> Float[Tensor, "resample text"]:
    """1 for the texts that are A's in random partitions of all of them."""
    chosen = torch.rand(resamples, n_a + n_b, generator=generator).topk(n_a, dim=1).indices
    return torch.zeros(resamples, n_a + n_b).scatter_(1, chosen, 1.0)


def _ranks(values: Float[Tensor, "text latent"]) -> Float[Tensor, "text latent"]:
    """Rank of each value in its column, from 1; equal values share their mean rank."""
    columns = values.T.contiguous()
    ordered = columns.sort(1).values
    below = torch.searchsorted(ordered, columns)
    up_to = torch.searchsorted(ordered, columns, right=True)
    return ((below + up_to + 1) / 2).T


def _auroc(rank_sum: Float[Tensor, "*resample latent"], n_a: int, n_b: int) -> Float[Tensor, "*resample latent"]:
    """AUROC from the sum of A's ranks (Mann and Whitney 1947)."""
    return (rank_sum - n_a * (n_a + 1) / 2) / (n_a * n_b)


def _newcombe(auroc: Float[Tensor, " d_sae"], n_a: int, n_b: int, confidence: float) -> Float[Tensor, " d_sae"]:
    """Lower end of an AUROC's interval: the value below it from which it is z standard deviations away."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    more = (n_a + n_b) / 2 - 1
    found = auroc.double()
    low, high = torch.zeros_like(found), found
    for _ in range(50):
        middle = (low + high) / 2
        spread = middle * (1 - middle) * (1 + more * (1 - middle) / (2 - middle) + more * middle / (1 + middle))
        too_low = found - middle > z * (spread / (n_a * n_b)).sqrt()
        low, high = torch.where(too_low, middle, low), torch.where(too_low, high, middle)
    return low.float()
