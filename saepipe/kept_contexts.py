"""The contexts that are kept of each latent, with its activations there, while many more are read.

Kept are those with the largest keys, so it does not matter how the contexts are cut into batches. Keys `by_strength`
keep a latent's strongest contexts, keys `by_chance` a random sample of those in which it is active.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BEFORE, AFTER = 18, 7
"""Tokens kept around the strongest one of a context: more before it, since that is all that the model saw there."""
FREE = -1
"""Key of a place that is not taken."""


def by_strength(values: Float[Tensor, " n"], contexts: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Keys that rise with the (positive) activation; of equal ones, an earlier context has the larger."""
    # The bits of a positive float, read as an integer, rise with it.
    return (values.float().contiguous().view(torch.int32).long() << 32) | (0x7FFFFFFF - contexts)


def by_chance(latents: Int[Tensor, " n"], contexts: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Keys that are as good as random, and the same for the same latent and context, in any run and on any device.

    Source: the finaliser of splitmix64 (Steele et al. 2014), twice.
    """
    mixed = _mixed(_mixed(contexts + 1) + latents + 1)
    return mixed & 0x7FFFFFFFFFFFFFFF


def _mixed(z: Tensor) -> Tensor:
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@dataclass
class Peaks:
    """Contexts with the strongest activation of a latent in each; the leading axes are the same everywhere."""

    keys: Int[Tensor, "*n"]
    """What decides which are kept."""
    values: Float[Tensor, "*n"]
    """The strongest activation in the context."""
    contexts: Int[Tensor, "*n"]
    """Number of the context."""
    positions: Int[Tensor, "*n"]
    """Where in its context the strongest activation is."""
    windows: Float[Tensor, "*n window"]
    """Activations from `BEFORE` tokens before that position to `AFTER` tokens after it; 0 outside the context."""

    @classmethod
    def none(cls, groups: int, slots: int, device: torch.device | str) -> "Peaks":
        """Places that are not taken."""
        keys = torch.full((groups, slots), FREE, device=device)
        values = torch.zeros(groups, slots, device=device)
        windows = torch.zeros(groups, slots, BEFORE + 1 + AFTER, device=device)
        return cls(keys, values, keys.clone(), torch.zeros_like(keys), windows)

    @classmethod
    def of(
        cls,
        f: Float[Tensor, "context seq d_sae"],
        first: int,
        contexts: Int[Tensor, " n"],
        latents: Int[Tensor, " n"],
        keys: Int[Tensor, " n"],
    ) -> "Peaks":
        """Cut them out of the activations of some contexts, the first of which has the number `first`."""
        positions = f[contexts, :, latents].argmax(1)
        around = positions[:, None] + torch.arange(-BEFORE, AFTER + 1, device=f.device)
        inside = (around >= 0) & (around < f.shape[1])
        windows = f[contexts[:, None], around.clamp(0, f.shape[1] - 1), latents[:, None]] * inside
        return cls(keys, f[contexts, positions, latents], contexts + first, positions, windows)

    def __getitem__(self, index: int | Tensor | tuple[Tensor, ...]) -> "Peaks":
        """Take some of them."""
        return Peaks(**{name: tensor[index] for name, tensor in vars(self).items()})

    def __setitem__(self, index: Tensor, others: "Peaks") -> None:
        """Put others in their place."""
        for name, tensor in vars(self).items():
            tensor[index] = getattr(others, name)


class KeptContexts:
    """A few contexts for each of many groups (a latent, or a latent and a range of its activations)."""

    def __init__(self, groups: int, slots: int, device: torch.device | str = "cpu") -> None:
        """Begin with none.

        Args:
            groups: Number of groups.
            slots: Contexts to keep of each.
            device: Where the activations will come from.
        """
        self.peaks = Peaks.none(groups, slots, device)
        """[groups, slots], with falling keys; `FREE` where there are fewer."""
        self._slots = slots

    def wanted(self, groups: Int[Tensor, " n"], keys: Int[Tensor, " n"]) -> Int[Tensor, " wanted"]:
        """Which of some candidates to `put`, by rising group and falling key, no more of a group than slots."""
        better = (keys > self.peaks.keys[groups, -1]).nonzero().squeeze(1)
        order = better[keys[better].argsort(descending=True)]
        order = order[groups[order].argsort(stable=True)]
        return order[_ranks(groups[order]) < self._slots]

    def put(self, groups: Int[Tensor, " n"], peaks: Peaks) -> None:
        """Take what was `wanted`, in that order."""
        if not len(groups):
            return
        touched, row = groups.unique_consecutive(return_inverse=True)
        both = Peaks.none(len(touched), 2 * self._slots, groups.device)
        for name, tensor in vars(both).items():
            tensor[:, : self._slots] = getattr(self.peaks, name)[touched]
            tensor[row, self._slots + _ranks(groups)] = getattr(peaks, name)
        order = both.keys.argsort(dim=1, descending=True, stable=True)[:, : self._slots]
        rows = torch.arange(len(touched), device=groups.device)[:, None]
        self.peaks[touched] = both[rows, order]

    def regroup(self, moved: Bool[Tensor, " group"], target: Int[Tensor, " group"]) -> None:
        """Empty some groups, and offer what they held to the groups that `target` names."""
        group, slot = ((self.peaks.keys >= 0) & moved[:, None]).nonzero(as_tuple=True)
        held = self.peaks[group, slot]
        self.peaks[moved] = Peaks.none(1, self._slots, moved.device)
        index = self.wanted(target[group], held.keys)
        self.put(target[group][index], held[index])


def _ranks(groups: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    """Number the members of each group from 0; groups are in rising order."""
    _, counts = groups.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(groups), device=groups.device) - starts.repeat_interleave(counts)
