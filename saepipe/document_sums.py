"""Sums of what is measured on tokens, a row for each document, and how sure a figure made of them is.

Tokens of one document are alike, so a confidence interval that counts them as so many independent samples is far too
narrow. Documents are drawn anew instead, all tokens of each together (the cluster bootstrap).
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

LEVEL = 0.95
"""Confidence of every interval."""
_DRAWS = 1000
_DRAWS_AT_ONCE = 50

Sums = Mapping[str, Float64[np.ndarray, " draw"]]
"""Name -> a value for each draw of documents."""


class DocumentSums:
    """Sums per document of named values; how the tokens are cut into batches does not matter."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._sums: dict[str, Float64[np.ndarray, " document"]] = {}

    def __len__(self) -> int:
        """Return how many documents were seen."""
        return len(self._rows)

    def add(self, documents: Int[np.ndarray, " token"], values: Mapping[str, Tensor]) -> None:
        """Add tokens.

        Args:
            documents: Number of each token's document.
            values: Name -> a value of each token.
        """
        numbers, which = np.unique(documents, return_inverse=True)
        rows = np.array([self._rows.setdefault(number, len(self._rows)) for number in numbers.tolist()], dtype=np.intp)
        for name, value in values.items():
            sums = self._grown(name)
            sums[rows] += np.bincount(which, _doubles(value), minlength=len(numbers))

    def merge(self, other: "DocumentSums") -> None:
        """Add what was summed elsewhere, such as in another process."""
        numbers = list(other._rows)
        for name, value in other._sums.items():
            padded = np.zeros(len(numbers))
            padded[: len(value)] = value
            self.add(np.array(numbers, dtype=np.int64), {name: torch.from_numpy(padded)})

    def _grown(self, name: str) -> Float64[np.ndarray, " document"]:
        """Return a name's sums, with room for every document so far."""
        sums = self._sums.get(name, np.zeros(0))
        if len(sums) < len(self._rows):
            sums = np.concatenate([sums, np.zeros(max(len(self._rows) - len(sums), len(sums)))])
        self._sums[name] = sums
        return sums

    def total(self) -> dict[str, Float64[np.ndarray, "1"]]:
        """Sum over all documents, as a single draw."""
        return {name: sums[: len(self)].sum(keepdims=True) for name, sums in self._sums.items()}

    def intervals(self, figures: Callable[[Sums], Sums]) -> dict[str, list[float]]:
        """Give the interval of each figure that holds `LEVEL` of its values over draws of documents.

        Source: the percentile bootstrap, Efron and Tibshirani 1993, over clusters. The draws are always the same.

        Args:
            figures: Computes figures from sums, of all draws at once; what is NaN in a draw is left out there.

        Returns:
            Name -> [low, high]; a figure without an interval is not in it (fewer than two documents, or always NaN).
        """
        n = len(self)
        if n < 2:
            return {}
        sums = np.stack([self._grown(name)[:n] for name in self._sums])
        random = np.random.default_rng(0)
        drawn = [
            random.multinomial(n, np.full(n, 1 / n), size=_DRAWS_AT_ONCE) @ sums.T
            for _ in range(_DRAWS // _DRAWS_AT_ONCE)
        ]
        found = figures(dict(zip(self._sums, np.concatenate(drawn).T, strict=True)))
        tails = [(1 - LEVEL) / 2, (1 + LEVEL) / 2]
        return {
            name: np.quantile(finite, tails).tolist()
            for name, values in found.items()
            if (finite := np.asarray(values)[np.isfinite(values)]).size
        }


def _doubles(value: Tensor) -> Float64[np.ndarray, " token"]:
    return value.detach().cpu().double().numpy()
