"""What goes into a training step of an SAE, and what comes out of it."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Step:
    """An optimizer step, as the loss of a batch must know it."""

    number: int | Int[Tensor, ""] = 0
    """Steps done before it, for warm-ups; a tensor where the loss is compiled, which a number would be built into."""
    dead: Int[Tensor, " dead"] | Callable[[], Int[Tensor, " dead"]] = field(
        default_factory=lambda: torch.zeros(0, dtype=torch.int64)
    )
    """Indices of the dead latents, for terms that revive them, or what finds them. Indices and not a mask, since their
    number decides shapes, which the host must know: what finds them waits for the device."""
    ranks: Ranks = ALONE
    """The processes that have the other parts of the global batch."""
    survey: Tensor | None = None
    """What `SAE.survey` found, where the rank's part comes in parts itself."""

    def find_dead(self) -> Int[Tensor, " dead"]:
        """Indices of the dead latents; best called after other work for the device was begun."""
        return self.dead if isinstance(self.dead, Tensor) else self.dead()


@dataclass
class Losses:
    """What one batch yields: the terms to minimise, and what counters and logs need without another pass."""

    terms: dict[str, Float[Tensor, ""]]
    """Named loss terms with their coefficients applied, under the names of SAELens; `mse_loss` is always there."""
    target: Float[Tensor, "token d_out"]
    """Normalised target, detached."""
    reconstruction: Float[Tensor, "token d_out"]
    """Reconstruction of `target`, detached."""
    fired: Float[Tensor, " d_sae"]
    """Number of tokens of the batch on which each latent was active, detached."""
    notes: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """What else `after_step` and the logs want to know of the batch, by name, detached."""

    @property
    def total(self) -> Float[Tensor, ""]:
        """Sum of the terms: what to call `backward` on."""
        return torch.stack(list(self.terms.values())).sum()

    @property
    def l0(self) -> Float[Tensor, ""]:
        """Active latents per token, mean over the batch."""
        return self.fired.sum() / self.target.shape[0]


@dataclass
class Pass:
    """What an architecture makes of one batch, with gradients; `SAE.loss` turns it into `Losses`."""

    reconstruction: Float[Tensor, "token d_out"]
    """Reconstruction of the target, in the normalised space."""
    fired: Float[Tensor, " d_sae"]
    """Number of tokens on which each latent was active, without gradient."""
    terms: dict[str, Float[Tensor, ""]]
    """Named terms besides `mse_loss`, with their coefficients applied."""
    notes: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """As in `Losses`."""


def warm_up(step: int | Int[Tensor, ""], steps: int) -> float | Float[Tensor, ""]:
    """Return the part of a coefficient that holds in a step, counted from 0, while it rises linearly over `steps`."""
    part = (step + 1) / max(steps, 1)
    return part.clamp(max=1.0) if isinstance(part, Tensor) else min(part, 1.0)
