"""BatchTopK: the largest pre-activations of a whole batch, k per token on average; afterwards a threshold."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe import sparse
from saepipe.keys import key
from saepipe.ranks import Ranks
from saepipe.saes.base import Losses, SAEConfig, Step
from saepipe.saes.ranked import Kept, RankedConfig, RankedSAE

_DIGIT_BITS = 11
_DIGITS = 2**_DIGIT_BITS
_SAMPLE_STEP = 257  # a prime: unless it divides d_sae, a sample does not keep to some latents; what is found is exact


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

    Source: Bussmann et al. 2024 (arXiv 2412.06410). Latents that tie for the last places are all kept, so that the
    choice does not depend on the order of the tokens; in bfloat16, whose rounding makes many ties, all or none of them,
    whichever comes nearer to k.
    """

    config_class: ClassVar[type[SAEConfig]] = BatchTopKConfig
    threshold: Tensor

    def __init__(self, cfg: SAEConfig, d_in: int, d_out: int | None = None) -> None:
        super().__init__(cfg, d_in, d_out)
        self.register_buffer("threshold", torch.zeros(()))

    @torch.no_grad()
    def survey(self, parts: Sequence[Float[Tensor, "token d_in"]], step: Step) -> Tensor | None:
        """Find the smallest value that the whole batch keeps."""
        count = self._count(sum(len(part) for part in parts), step)
        each = (self._hidden_pre(self._centre(self._normalise(part))).flatten() for part in parts)
        return smallest_kept(candidates(each, count), count, step.ranks)[0]

    def _count(self, tokens: int, step: Step) -> int:
        """How many latents of the global batch are kept: of its whole tokens, or k times a rank's would be rounded."""
        return int(self.cfg.k * (step.ranks.world_size * tokens))

    def _keep(self, ranked: Tensor, step: Step) -> Kept:
        values = ranked.flatten()
        if step.survey is None:
            smallest, places = smallest_kept(values, self._count(len(ranked), step), step.ranks)
            places = places[values[places] >= smallest]
        else:
            smallest = step.survey
            places = ((values >= smallest) & (values > 0)).nonzero().squeeze(1)
        kept = sparse.Entries.at(ranked, places)
        # What is not a number is never among the largest, and must show in the loss all the same.
        unsound = torch.where(ranked.sum().isnan(), math.nan, 0.0)
        return Kept(kept.values + unsound.to(kept.values.dtype), kept.indices, kept.offsets, smallest)

    def _notes(self, kept: Kept) -> dict[str, Tensor]:
        """The smallest activation that is kept; 0 where none is, since all of them are positive."""
        assert kept.smallest is not None
        return {"topk_threshold": torch.where(kept.smallest.isfinite(), kept.smallest, 0.0)}

    @torch.no_grad()
    def after_step(self, losses: Losses) -> None:
        """Move the threshold towards the smallest activation that was kept."""
        super().after_step(losses)
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


def candidates(parts: Iterable[Float[Tensor, " _"]], count: int) -> Float[Tensor, " some"]:
    """Hold of all parts' values, which come one after the other, no more than the `count` largest positive, and ties.

    Args:
        parts: Values; at least one part.
        count: How many of them may be kept.
    """
    found: Tensor | None = None
    for part in parts:
        positive = part[part > 0]
        found = positive if found is None else torch.cat([found, positive])
        if len(found) > count > 0:
            found = found[found >= found.topk(count, sorted=False).values.min()]
    assert found is not None
    return found


def smallest_kept(
    values: Float[Tensor, " n"], count: int, ranks: Ranks
) -> tuple[Float[Tensor, ""], Int[Tensor, " some"]]:
    """Find the smallest of the `count` largest positive values of all ranks.

    Sorting out those below a pivot first is exact and three times as fast on a CPU as a search in all of them: the
    pivot is a value that a sample says is exceeded by somewhat more than `count`.

    Args:
        values: Values of this rank.
        count: How many of all ranks' values to keep.
        ranks: The ranks.

    Returns:
        That value (infinite: none is kept), and the places where positive values of about that size and more are.
    """
    sample = values[::_SAMPLE_STEP]
    wanted = int(1.3 * count / ranks.world_size / _SAMPLE_STEP) + 8
    pivot = sample.topk(wanted).values[-1] if wanted <= len(sample) else sample.new_zeros(())
    tiny = torch.nextafter(values.new_zeros(()), values.new_ones(()))
    # A number, since one comparison with a number reads the batch once at full rate; nonzero waits anyway.
    least = float(torch.maximum(ranks.least(pivot.clone()), tiny))
    places = (values >= least).nonzero().squeeze(1)
    total = _count(places, ranks)
    if total < count:
        places = (values > 0).nonzero().squeeze(1)
        total = _count(places, ranks)
    found = values[places]
    if not count:
        return found.new_full((), math.inf), places
    if total <= count:
        return ranks.least(torch.cat([found, found.new_full((1,), math.inf)]).min()), places
    return kth_largest(found, count, ranks), places


def _count(places: Tensor, ranks: Ranks) -> int:
    if ranks.world_size == 1:
        return len(places)
    return int(ranks.sum(torch.tensor(len(places), device=places.device)))


def kth_largest(values: Float[Tensor, " n"], k: int, ranks: Ranks) -> Float[Tensor, ""]:
    """Find the k-th largest of the positive values that all ranks have, of which there are k or more.

    Returns:
        That value; in bfloat16 the next larger number, where that comes nearer to k values, but some.
    """
    if ranks.world_size == 1 and values.device.type == "cuda":  # which sorts faster than the host asks for the digits
        value = values.sort(descending=True).values[k - 1]
    else:
        value = _by_digits(values, k, ranks)
    if values.dtype != torch.bfloat16:
        return value
    above, ties = ranks.sum(torch.stack([(values > value).sum(), (values == value).sum()]))
    left = k - above
    return torch.where((ties > 2 * left) & (left < k), torch.nextafter(value, value.new_full((), math.inf)), value)


def _by_digits(values: Tensor, k: int, ranks: Ranks) -> Tensor:
    """Find the k-th largest.

    The bits of positive numbers, read as integers, have the numbers' order; the result is found a digit at a time, from
    how many values of all ranks have which digit.
    """
    wide = values if values.dtype == torch.float64 else values.float()
    bits = wide.view(torch.int64 if wide.dtype == torch.float64 else torch.int32)
    found, left = bits.new_zeros((), dtype=torch.int64), torch.tensor(k, device=bits.device)
    for digit in reversed(range(-(-8 * wide.itemsize // _DIGIT_BITS))):
        shifted = bits >> digit * _DIGIT_BITS
        digits = torch.where(shifted >> _DIGIT_BITS == found, shifted & (_DIGITS - 1), _DIGITS)
        counts = ranks.sum(torch.bincount(digits, minlength=_DIGITS + 1)[:_DIGITS])
        from_top = counts.flip(0).cumsum(0)
        place = torch.searchsorted(from_top, left)
        here = _DIGITS - 1 - place
        found, left = found * _DIGITS + here, left - from_top[place] + counts[here]
    return found.to(bits.dtype).view(wide.dtype).to(values.dtype)
