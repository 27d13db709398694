"""A smoothed bigram model: the baseline that the demo model has to beat."""

from __future__ import annotations

import torch
from torch import Tensor


class BigramModel:
    """Counts pairs of neighbouring tokens.

    The bigram estimate is interpolated with the unigram by Witten-Bell's rule: the weight of the unigram after a token
    is the chance that something new follows it, followers / (followers + occurrences). The unigram adds one to all.

    Args:
        vocabulary: number of tokens; memory is its square times four bytes.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self._pairs = torch.zeros(vocabulary * vocabulary, dtype=torch.int32)

    def count(self, tokens: Tensor) -> None:
        """Adds the pairs of `[batch, seq]` token ids."""
        pairs = (tokens[:, :-1] * self._vocabulary + tokens[:, 1:]).flatten()
        self._pairs.index_add_(0, pairs, torch.ones_like(pairs, dtype=torch.int32))

    def loss(self, tokens: Tensor) -> float:
        """Mean bigram loss of `[batch, seq]` token ids, in nats per predicted token."""
        counts = self._pairs.view(self._vocabulary, self._vocabulary)
        previous, following = tokens[:, :-1].flatten(), tokens[:, 1:].flatten()
        occurrences = counts.sum(dim=1)[previous]
        followers = (counts > 0).sum(dim=1)[previous]
        seen = counts[previous, following]
        probability = (seen + followers * self._unigram()[following]) / (occurrences + followers).clamp(min=1)
        probability = torch.where(occurrences > 0, probability, self._unigram()[following])
        return float(-probability.log().mean())

    def unigram_loss(self, tokens: Tensor) -> float:
        """Mean unigram loss of `[batch, seq]` token ids, in nats per predicted token."""
        return float(-self._unigram()[tokens[:, 1:].flatten()].log().mean())

    def _unigram(self) -> Tensor:
        counts = self._pairs.view(self._vocabulary, self._vocabulary).sum(dim=0) + 1.0
        return counts / counts.sum()
