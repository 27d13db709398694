"""Normalisations that take each token by itself, so that they cannot be folded into weights.

Other libraries trained SAEs behind them, and such an SAE is right only with them; ours are not trained so.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

TOKEN_NORMS = ("none", "layer_norm", "constant_norm_rescale")
"""none; layer_norm: less the mean of the token's values, over their standard deviation; constant_norm_rescale: scaled
to norm sqrt(d_in)."""
_EPS = 1e-5


class Moments(NamedTuple):
    """What takes a token's normalised values back: `values * scale + shift`."""

    scale: Float[Tensor, "*batch 1"]
    shift: Float[Tensor, "*batch 1"] | float


def normalise(x: Float[Tensor, "*batch d_in"], kind: str) -> tuple[Float[Tensor, "*batch d_in"], Moments | None]:
    """Normalise each token.

    Args:
        x: Raw activations.
        kind: One of TOKEN_NORMS.

    Returns:
        The normalised activations, and what takes them back (None for `none`).

    Source: SAELens, whose definitions OpenAI's TopK autoencoders share (arXiv 2406.04093, code): the standard deviation
    is that of a sample, and 1e-5 is added to it.
    """
    if kind == "none":
        return x, None
    if kind == "layer_norm":
        mean = x.mean(-1, keepdim=True)
        std = x.std(-1, keepdim=True)
        return (x - mean) / (std + _EPS), Moments(std, mean)
    scale = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
    return x / scale, Moments(scale, 0.0)
