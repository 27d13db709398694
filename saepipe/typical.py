"""How strongly latents fire where they do: the unit in which `saepipe.steering` measures strength."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe.errors import UserError
from saepipe.hooked import HookedSAETransformer
from saepipe.reading import Reading, activations
from saepipe.saes.base import SAE


@dataclass(frozen=True)
class Typical:
    """The typical activation of each latent: the mean of its activations over the tokens on which it is active."""

    mean: Float[Tensor, " d_sae"]
    """Typical activation, in the units of the latents; NaN of a latent that never fired."""
    fired: Int[Tensor, " d_sae"]
    """Tokens on which each was active."""
    tokens: int
    """Tokens that were read; special ones and position 0 are left out."""

    @classmethod
    def measure(cls, model: HookedSAETransformer, sae: SAE, reading: Reading) -> "Typical":
        """Measure it.

        Args:
            model: The language model.
            sae: The SAE.
            reading: What to read, from `Texts.batches` or `reading.contexts`.
        """
        total = torch.zeros(sae.d_sae, dtype=torch.float64)
        fired = torch.zeros(sae.d_sae, dtype=torch.int64)
        tokens = 0
        for read in reading:
            f = activations(model, sae, read).flatten(0, 1)
            total += f.sum(0).cpu()
            fired += (f > 0).sum(0).cpu()
            tokens += int(read.counted.sum())
        return cls((total / fired).float(), fired, tokens)

    def of(self, latent: int) -> float:
        """Return the typical activation of a latent.

        Raises:
            UserError: It never fired, so that it is not known.
        """
        if not self.fired[latent]:
            raise UserError(
                f"latent {latent} fired on none of the {self.tokens:,} tokens that were read, so its typical "
                "activation is not known; read more or other text, or say what it is"
            )
        return float(self.mean[latent])
