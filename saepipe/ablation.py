"""What the language model loses when latents are ablated: cross-entropy with each of them at 0, less that without."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saepipe.document_sums import DocumentSums, Sums
from saepipe.hooked import HookedSAETransformer
from saepipe.reading import Read, Reading, activations
from saepipe.saes.base import SAE
from saepipe.steering import Steer, check_latents

_TOKENS = "tokens"


@dataclass(frozen=True)
class AblationEffect:
    """The effect of ablating a latent wherever it is active."""

    latent: int
    ce_increase: float
    """Rise of the cross-entropy, in nats per predicted token, over all of them."""
    ce_interval: list[float] | None
    """Its 95 % confidence interval over texts, or contexts; None for a single one, or where it is never active."""
    ce_increase_where_active: float
    """The same over what is predicted from tokens on which the latent is active; NaN where it never is."""
    active: int
    """Such tokens."""
    tokens: int
    """All tokens from which something is predicted; special tokens and position 0 are left out, and left alone."""


@torch.no_grad()
def ablation_effects(
    model: HookedSAETransformer, sae: SAE, latents: Sequence[int], reading: Reading
) -> list[AblationEffect]:
    """Measure what the model loses by each of some latents, one at a time, with all else of the activations kept.

    A latent costs a forward pass over the texts in which it is active.

    Args:
        model: The language model.
        sae: The SAE.
        latents: Which latents.
        reading: What to read, from `Texts.batches` or `reading.contexts`.

    Raises:
        UserError: A latent is none of the SAE's.
    """
    check_latents(sae, latents)
    sums, rise_active, active = DocumentSums(), dict.fromkeys(latents, 0.0), dict.fromkeys(latents, 0)
    for read in reading:
        f = activations(model, sae, read)[..., list(latents)].cpu()
        clean = _losses(model, read)
        texts = len(sums) + np.arange(len(read.ids))
        sums.add(texts, {_TOKENS: read.predicting.sum(1)})
        for column, latent in enumerate(latents):
            fires = f[..., column] > 0
            rows = fires.any(1)
            if not bool(rows.any()):
                continue
            part = Read(*(each[rows] for each in read))
            steer = Steer(sae, [latent], "ablate", positions=part.counted)
            with model.hooks(fwd_hooks=steer.fwd_hooks):
                risen = (_losses(model, part) - clean[rows]) * part.predicting
            here = fires[rows, :-1] & part.predicting
            sums.add(texts[rows.numpy()], {str(latent): risen.sum(1)})
            rise_active[latent] += float(risen[here].sum())
            active[latent] += int(here.sum())
    total, intervals = sums.total(), sums.intervals(_rises)
    tokens = int(total[_TOKENS][0])
    return [
        AblationEffect(
            latent,
            float(total[str(latent)][0]) / max(tokens, 1) if str(latent) in total else 0.0,
            intervals.get(str(latent)),
            rise_active[latent] / active[latent] if active[latent] else float("nan"),
            active[latent],
            tokens,
        )
        for latent in latents
    ]


def _rises(sums: Sums) -> Sums:
    return {name: value / sums[_TOKENS] for name, value in sums.items() if name != _TOKENS}


def _losses(model: HookedSAETransformer, read: Read) -> Float[Tensor, "text before_last"]:
    """Loss of what follows each token."""
    return model(read.ids, return_type="loss", loss_per_token=True).double().cpu()
