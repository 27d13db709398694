"""How well an SAE reconstructs, and how much of a language model's loss it keeps.

Callers leave special tokens and position 0 out first: one massive row lifts the same reconstruction's explained
variance from 0.75 to 0.997.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor


class ReconstructionFit:
    """Quality of a reconstruction over a whole set: sums in float64, however the set is cut into batches.

    Args:
        d: Width of the activations.
    """

    def __init__(self, d: int) -> None:
        self.rows = 0
        self._sum_x = torch.zeros(d, dtype=torch.float64)
        self._sums = torch.zeros(5, dtype=torch.float64)

    def update(self, x: Float[Tensor, "token d"], reconstruction: Float[Tensor, "token d"]) -> None:
        """Add a batch; its sums stay on its device."""
        x = double(x)
        parts = torch.stack(list(token_fit(x, reconstruction).values()))
        self._sums = self._sums.to(x.device) + parts.sum(1)
        self._sum_x = self._sum_x.to(x.device) + x.sum(0)
        self.rows += len(x)

    def compute(self) -> dict[str, float]:
        """Measures over all batches; NaN where one is not defined.

        Returns:
            mse: Squared error per token, summed over d.
            explained_variance: 1 - E||x - xhat||^2 / (E||x||^2 - ||E x||^2), as SAELens.
            cosine_similarity: Mean over tokens.
            relative_reconstruction_bias: E||xhat||^2 / E[x . xhat]; below 1 the reconstruction is shrunk.
                Source: Rajamanoharan et al. 2024 (arXiv 2404.16014).
        """
        assert self.rows, "no row was added"
        error, squared, squared_reconstruction, dot, cosine = (self._sums / self.rows).tolist()
        variance = squared - float((self._sum_x / self.rows).square().sum())
        return {
            "mse": error,
            "explained_variance": 1 - error / variance if variance > 0 else float("nan"),
            "cosine_similarity": cosine,
            "relative_reconstruction_bias": squared_reconstruction / dot if dot else float("nan"),
        }


def token_fit(x: Float[Tensor, "token d"], reconstruction: Float[Tensor, "token d"]) -> dict[str, Tensor]:
    """Measure each token's reconstruction, in float64.

    Returns:
        error (squared, summed over d), squared, squared_reconstruction, dot, cosine (0 where a vector is zero).
    """
    x, reconstruction = double(x), double(reconstruction)
    squared, squared_reconstruction = x.square().sum(-1), reconstruction.square().sum(-1)
    dot = (x * reconstruction).sum(-1)
    lengths = (squared * squared_reconstruction).sqrt()
    return {
        "error": (x - reconstruction).square().sum(-1),
        "squared": squared,
        "squared_reconstruction": squared_reconstruction,
        "dot": dot,
        "cosine": torch.where(lengths > 0, dot / lengths, 0.0),
    }


def ce_loss_score(
    clean: Float64[np.ndarray, "*draw"] | float,
    spliced: Float64[np.ndarray, "*draw"] | float,
    ablated: Float64[np.ndarray, "*draw"] | float,
) -> Float64[np.ndarray, "*draw"]:
    """Share of the cross entropy that the SAE keeps: 1 as the clean model, 0 as with the activation ablated.

    NaN where ablating it changes nothing.
    """
    lost = np.asarray(ablated, np.float64) - clean
    return ratio(np.asarray(ablated, np.float64) - spliced, lost)


def kl_div_score(
    spliced: Float64[np.ndarray, "*draw"] | float, ablated: Float64[np.ndarray, "*draw"] | float
) -> Float64[np.ndarray, "*draw"]:
    """The same for the divergence from the clean model's predictions, which is 0 for the clean model itself."""
    return ce_loss_score(0.0, spliced, ablated)


def ratio(
    above: Float64[np.ndarray, "*draw"] | float, below: Float64[np.ndarray, "*draw"] | float
) -> Float64[np.ndarray, "*draw"]:
    """Divide; NaN where that is not defined."""
    above, below = np.asarray(above), np.asarray(below)
    return np.divide(above, below, out=np.full(below.shape, np.nan), where=below != 0)


def histogram(values: Float[Tensor, " value"], edges: Sequence[float]) -> dict[str, list[float] | list[int]]:
    """Count values between edges; one below the first or above the last counts in the outermost bin.

    Returns:
        edges, counts (one fewer).
    """
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    bins = torch.bucketize(values.cpu().double(), inner, right=True)
    return {"edges": list(edges), "counts": torch.bincount(bins, minlength=len(edges) - 1).tolist()}


def geometric_median(
    rows: Float[Tensor, "token d"], *, tolerance: float = 1e-6, most_steps: int = 200
) -> Float[Tensor, " d"]:
    """Find the point with the least sum of distances to all rows, which no few rows can pull far away.

    Source: Weiszfeld's iteration from the mean, with the rule of Vardi and Zhang (2000) for where it meets a row.

    Args:
        rows: The rows, at least one.
        tolerance: Where to stop: length of a step, as part of the mean distance.
        most_steps: Where to stop in any case.

    Returns:
        The median, in float64.
    """
    parts = rows.split(4096)  # in float64, so not all rows at once
    median = torch.stack([double(part).sum(0) for part in parts]).sum(0) / len(rows)
    for _ in range(most_steps):
        weighted, weights, at_median, distances = torch.zeros_like(median), 0.0, 0, 0.0
        for part in parts:
            offsets = double(part) - median
            distance = offsets.norm(dim=1)
            inverse = torch.where(distance > 0, 1 / distance, 0.0)
            weighted += inverse @ offsets
            weights += float(inverse.sum())
            at_median += int((distance == 0).sum())
            distances += float(distance.sum())
        pull = float(weighted.norm())
        # Rows at the median hold it against a pull of up to their number.
        if pull <= at_median or not weights:
            return median
        step = (1 - at_median / pull) * weighted / weights
        median = median + step
        if float(step.norm()) <= tolerance * distances / len(rows):
            return median
    return median


def double(x: Tensor) -> Tensor:
    """Convert to float64, on the CPU where the device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()  # MPS has no float64
