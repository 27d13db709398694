"""Rows as 8-bit integers: centred, scaled by channel and by row.

    x[t, c]  is about  centre[c] + scale[c] * row_scale[t] * q[t, c],  q from -127 to 127

`centre` and `scale` are mean and spread of the shard's counted rows, so a channel that is large on every token costs
the others nothing; `row_scale` fits each row's largest value, so neither does an attention sink. An error is at most
half a step, row_scale * scale / 2 (docs/int8.md has what that costs an SAE).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int8
from torch import Tensor

LEVELS = 127
# A channel that hardly moves on ordinary tokens may move on a sink, whose row would then spend all levels on it.
_LEAST_SPREAD = 1e-2


@dataclass(frozen=True)
class Scales:
    """What a shard's integers are multiplied by and added to."""

    centre: Float32[Tensor, " d_in"]
    scale: Float32[Tensor, " d_in"]

    @classmethod
    def of(cls, mean: Float64[np.ndarray, " d_in"], mean_square: Float64[np.ndarray, " d_in"]) -> "Scales":
        """Choose them from the means of a shard's rows and of their squares; all zero where no row was counted."""
        spread = np.sqrt(np.maximum(mean_square - mean**2, 0))
        least = _LEAST_SPREAD * np.sqrt(np.mean(spread**2)) or 1.0
        scale = np.maximum(spread, least)
        return cls(torch.from_numpy(mean.astype(np.float32)), torch.from_numpy(scale.astype(np.float32)))

    def encode(
        self, rows: Float64[np.ndarray, "token d_in"]
    ) -> tuple[Int8[np.ndarray, "token d_in"], Float32[np.ndarray, " token"]]:
        """Return the integers and the scale of each row."""
        values = (rows - self.centre.numpy()) / self.scale.numpy()
        row_scale = (np.abs(values).max(axis=1) / LEVELS).astype(np.float32)
        steps = np.where(row_scale > 0, row_scale, 1).astype(np.float64)
        return np.clip(np.rint(values / steps[:, None]), -LEVELS, LEVELS).astype(np.int8), row_scale


def decode(
    values: Int8[Tensor, "token d_in"],
    row_scale: Float32[Tensor, " token"],
    scales: Scales,
) -> Float[Tensor, "token d_in"]:
    """Return the rows of one shard as float32."""
    rows = values.float().mul_(row_scale[:, None])
    return rows.mul_(scales.scale).add_(scales.centre)
