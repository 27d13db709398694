"""What each latent does over a stream of contexts: how often it fires, how strongly, and where most of all.

One pass, with a state whose size depends on the number of latents alone, not on how much is read. Special tokens and
position 0 are left out of everything.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepipe import progress
from saepipe.errors import UserError
from saepipe.kept_contexts import KeptContexts, Peaks, by_chance, by_strength
from saepipe.language_model import LanguageModel
from saepipe.saes.base import SAE
from saepipe.token_store import TokenStore, ordinary

BINS = 32
"""Bins of an activation histogram; a power of two, so that widening one merges whole bins and stays exact."""
STRATA = 16
"""Ranges of a latent's activations from each of which one context is kept; a power of two for the same reason."""
_CHUNK_ELEMENTS = 1 << 22
"""Most activations of latents held at once, unless one context alone has more: 16 MiB, which the C library hands out
again, where larger blocks are new to the process each time (64 MiB made encoding 1.5 times as slow on a CPU)."""


class Contexts:
    """The contexts to read: held-out ones, and training ones where those are too few; evenly spread over each."""

    def __init__(self, tokens: TokenStore, most_tokens: int) -> None:
        """Choose them.

        Args:
            tokens: The token store.
            most_tokens: Tokens to read at most (whole contexts; at least one).
        """
        self._seq = tokens.context_size
        wanted = max(1, most_tokens // self._seq)
        self._sides = []
        for side in (tokens.heldout, tokens.train):
            n = min(wanted, len(side))
            self._sides.append((side, np.arange(n) * len(side) // max(n, 1)))
            wanted -= n
        (_, held_out), (_, train) = self._sides
        self.held_out_tokens = len(held_out) * self._seq
        """How many of the tokens are from held-out documents."""
        self.training_tokens = len(train) * self._seq
        """How many are from documents that were trained on."""

    def __len__(self) -> int:
        """Return their number."""
        return sum(len(chosen) for _, chosen in self._sides)

    def batches(
        self, size: int, step: str = "analyze"
    ) -> Iterator[tuple[Int[Tensor, "context seq"], Bool[Tensor, "context seq"]]]:
        """Read ids, and which tokens count, some contexts at a time, with a bar.

        Args:
            size: How many at a time.
            step: What is going on, for the bar.
        """
        total = len(self) * self._seq
        with progress.bar(step, total) as bar:
            for side, chosen in self._sides:
                for start in range(0, len(chosen), size):
                    rows = chosen[start : start + size]
                    ids = torch.from_numpy(side.ids[rows].astype(np.int64))
                    counted = ordinary(np.asarray(side.special[rows]), np.arange(self._seq))
                    yield ids, torch.from_numpy(counted)
                    bar.update(ids.numel())

    def ids(self, context: int) -> list[int]:
        """Return the token ids of one context, by its number in the order of reading."""
        (held_out, first), (train, others) = self._sides
        if context < len(first):
            return held_out.ids[first[context]].tolist()
        return train.ids[others[context - len(first)]].tolist()


class LatentActivity:
    """Firing counts, activation histograms and kept contexts of every latent.

    A context counts once per latent, with its strongest position. The result does not depend on how the contexts are
    cut into updates.
    """

    def __init__(self, d_sae: int, *, contexts: int, sampled: int = 4, device: torch.device | str = "cpu") -> None:
        """Begin with nothing read.

        Args:
            d_sae: Number of latents.
            contexts: Top contexts to keep per latent.
            sampled: Contexts to keep that are drawn at random from those in which the latent is active.
            device: Where the activations will come from.
        """
        self.tokens = 0
        """Tokens counted so far."""
        self.maxima: Float[Tensor, " d_sae"] = torch.zeros(d_sae, device=device)
        """Strongest activation of each latent."""
        self.histogram: Int[Tensor, "d_sae bins"] = torch.zeros(d_sae, BINS, dtype=torch.int64, device=device)
        """Positive activations, in equal bins from 0 to `histogram_top`."""
        self._total = torch.zeros(d_sae, dtype=torch.float64)
        self._top = KeptContexts(d_sae, contexts, device)
        self._sampled = KeptContexts(d_sae, sampled, device)
        self._strata = KeptContexts(d_sae * STRATA, 1, device)
        self._exponents = torch.full((d_sae,), -1000)  # base-2 logarithm of the histogram's top; here: not set

    @property
    def fired(self) -> Int[Tensor, " d_sae"]:
        """Tokens on which each latent was active."""
        return self.histogram.sum(1)

    @property
    def typical(self) -> Float[Tensor, " d_sae"]:
        """Mean activation of each latent over the tokens on which it was active, as in `saepipe.typical`; NaN: none."""
        return (self._total / self.fired.cpu()).float()

    @property
    def histogram_top(self) -> Float[Tensor, " d_sae"]:
        """Upper end of each latent's histogram: the least power of two above its maximum."""
        return torch.exp2(self._exponents.double()).float()

    @property
    def top(self) -> Peaks:
        """The strongest contexts [d_sae, contexts], falling; of equal ones the earlier read first."""
        return self._top.peaks

    @property
    def sampled(self) -> Peaks:
        """Contexts [d_sae, sampled] drawn at random from those in which the latent is active."""
        return self._sampled.peaks

    @property
    def strata(self) -> Peaks:
        """Contexts [d_sae, STRATA], one drawn at random from those whose strongest activation is in the same stratum.

        The strata are equal ranges from 0 to `histogram_top`.
        """
        return Peaks(
            **{name: held.unflatten(0, (-1, STRATA)).squeeze(2) for name, held in vars(self._strata.peaks).items()}
        )

    def update(self, first: int, f: Float[Tensor, "context seq d_sae"], counted: Bool[Tensor, "context seq"]) -> None:
        """Take the activations of further contexts.

        Args:
            first: Number of the first of them; they are numbered in order.
            f: Activations of the latents; overwritten with 0 where they do not count.
            counted: The tokens that count; activations elsewhere are ignored, whatever they are.
        """
        f[~counted] = 0
        self.tokens += int(counted.sum())
        self._total += f.sum(dim=(0, 1)).cpu()
        peaks = f.amax(dim=1)
        self.maxima = torch.maximum(self.maxima, peaks.amax(dim=0))
        self._widen()
        self._count(f)
        context, latent = (peaks > 0).nonzero(as_tuple=True)
        values = peaks[context, latent]
        chance = by_chance(latent, context + first)
        stratum = (values * (STRATA / self.histogram_top).to(f.device)[latent]).long().clamp(max=STRATA - 1)
        for kept, groups, keys in (
            (self._top, latent, by_strength(values, context + first)),
            (self._sampled, latent, chance),
            (self._strata, latent * STRATA + stratum, chance),
        ):
            chosen = kept.wanted(groups, keys)
            kept.put(groups[chosen], Peaks.of(f, first, context[chosen], latent[chosen], keys[chosen]))

    def _count(self, f: Tensor) -> None:
        """Add to the histograms."""
        flat = f.reshape(-1)
        active = (flat > 0).nonzero().squeeze(1)
        latent = active % f.shape[-1]
        bins_per_unit = (BINS / self.histogram_top).to(f.device)
        bins = (flat[active] * bins_per_unit[latent]).long().clamp(max=BINS - 1)
        self.histogram.view(-1).scatter_add_(0, latent * BINS + bins, torch.ones_like(latent))

    def _widen(self) -> None:
        """Merge bins and strata until each latent's reach above its maximum."""
        maxima = self.maxima.cpu()
        exponents = torch.where(maxima > 0, torch.frexp(maxima).exponent.long(), self._exponents)  # < 2 ** exponent
        doublings = (exponents - self._exponents).clamp(max=BINS.bit_length() - 1).to(self.histogram.device)
        self._exponents = exponents
        if not doublings.any():
            return
        for times in doublings[doublings > 0].unique().tolist():
            latents = (doublings == times).nonzero().squeeze(1)
            merged = self.histogram[latents].view(len(latents), BINS >> times, 1 << times).sum(2)
            self.histogram[latents] = torch.nn.functional.pad(merged, (0, BINS - (BINS >> times)))
        stratum = torch.arange(STRATA, device=doublings.device)
        target = torch.arange(len(doublings), device=doublings.device)[:, None] * STRATA + (
            stratum >> doublings[:, None]
        )
        self._strata.regroup((doublings > 0).repeat_interleave(STRATA), target.flatten())

    def spread(self, n: int) -> list[int]:
        """Pick n of the latents that fired, evenly over their ranks by density, and return them in rising order."""
        fired = self.fired
        live = fired.nonzero().squeeze(1)
        ranked = live[fired[live].argsort(stable=True)]
        n = min(n, len(live))
        middles = ((torch.arange(n, dtype=torch.float64) + 0.5) * len(live) / max(n, 1)).long()
        return sorted(ranked[middles.to(ranked.device)].tolist())


def observe(
    model: LanguageModel, sae: SAE, contexts: Contexts, top_contexts: int, *, batch_prompts: int
) -> LatentActivity:
    """Run the model and the SAE over contexts and gather what the latents do.

    Args:
        model: The language model.
        sae: The SAE, on the model's device.
        contexts: What to read.
        top_contexts: Contexts to keep per latent.
        batch_prompts: Contexts per forward pass.
    """
    hook = sae.metadata["hook_name"]
    activity = LatentActivity(sae.d_sae, contexts=min(top_contexts, len(contexts)), device=model.device)
    read = 0
    with torch.inference_mode():
        for ids, counted in contexts.batches(batch_prompts):
            x = model.capture(ids, [hook])[hook]
            mask = counted.to(model.device)
            if not x[mask].isfinite().all():
                raise UserError(
                    f"model.dtype={model.config.dtype} gives activations at {hook} that are not finite; the run's "
                    "model or its files have changed since it was trained, so cache and train it anew"
                )
            step = max(1, _CHUNK_ELEMENTS // (ids.shape[1] * sae.d_sae))
            for start in range(0, len(ids), step):
                chunk = slice(start, start + step)
                activity.update(read + start, sae.encode(x[chunk].float()), mask[chunk])
            read += len(ids)
    return activity
