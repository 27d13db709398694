"""What a latent's decoder row does to the logits by itself: the tokens that it makes more and less likely.

The row is read off by the final normalisation's weights and the unembedding. What that normalisation divides by is left
out: it differs from token to token, but is the same for all logits.

Source: nostalgebraist 2020 (interpreting GPT: the logit lens), of decoder rows.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepipe.hook_names import split_head
from saepipe.language_model import LanguageModel
from saepipe.places import RESIDUAL
from saepipe.saes.base import SAE

_VOCABULARY, _LATENTS = 1 << 14, 1 << 10
"""Tokens and latents that are looked at together: 64 MiB of logits."""


@dataclass(frozen=True)
class LogitEffects:
    """The extremes of what each of some latents adds to the logits, per unit of activation.

    An effect counts from the mean over the vocabulary, which no probability depends on.
    """

    promoted: Float[Tensor, "latent n"]
    """The largest effects, falling."""
    promoted_ids: Int[Tensor, "latent n"]
    """Their tokens."""
    suppressed: Float[Tensor, "latent n"]
    """The smallest effects, rising."""
    suppressed_ids: Int[Tensor, "latent n"]
    """Their tokens."""


def missing(model: LanguageModel, sae: SAE) -> str | None:
    """Say why an SAE's decoder rows cannot be read off by the unembedding; None where they can."""
    hook = sae.metadata["hook_name_out"] if sae.is_transcoder else sae.metadata["hook_name"]
    point, head = split_head(hook)
    if head is not None or point.rsplit(".")[-1] not in RESIDUAL:
        return f"the logit lens reads what is added to the residual stream, and {hook} is not known to be there"
    try:
        W_U, _ = model.outer.W_U, model.outer.ln_final
    except (AttributeError, StopIteration):
        return f"no unembedding, or no normalisation before it, is known of {model.name}"
    if W_U.shape[0] != sae.d_out:
        return f"the unembedding reads {W_U.shape[0]} numbers, and {hook} has {sae.d_out}"
    return None


@torch.inference_mode()
def logit_effects(model: LanguageModel, sae: SAE, latents: Int[Tensor, " latent"], n: int) -> LogitEffects:
    """Find the tokens whose logits some latents raise and lower most.

    Args:
        model: The language model.
        sae: The SAE, of which nothing is `missing`.
        latents: Which latents.
        n: Tokens to find, of either kind.
    """
    outer = model.outer
    W_U = outer.W_U
    rows = _through_norm(outer.ln_final, sae.W_dec[latents].to(W_U.device).float(), W_U.dtype)
    parts = range(0, W_U.shape[1], _VOCABULARY)
    mean = sum((W_U[:, start : start + _VOCABULARY].float().sum(1) for start in parts), torch.zeros(())) / W_U.shape[1]
    n = min(n, W_U.shape[1])
    best = [torch.full((len(latents), n), -torch.inf, device=W_U.device) for _ in range(2)]
    ids = [torch.zeros(len(latents), n, dtype=torch.int64, device=W_U.device) for _ in range(2)]
    for start in parts:
        columns = W_U[:, start : start + _VOCABULARY].float() - mean[:, None]
        for first in range(0, len(latents), _LATENTS):
            some = slice(first, first + _LATENTS)
            effects = rows[some] @ columns
            for side, signed in enumerate((effects, -effects)):
                found = signed.topk(min(n, signed.shape[1]), dim=1)
                both = torch.cat([best[side][some], found.values], 1).topk(n, dim=1)
                ids[side][some] = torch.cat([ids[side][some], found.indices + start], 1).gather(1, both.indices)
                best[side][some] = both.values
    return LogitEffects(best[0].cpu(), ids[0].cpu(), -best[1].cpu(), ids[1].cpu())


def _through_norm(norm: torch.nn.Module, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Do with each row what the final normalisation does with what is added to its input, but for its divisor.

    Asked of the module itself, since families differ in what its weight means (Gemma adds 1): on ones of alternating
    sign, whose mean is 0 and whose norm is 1 per channel, any normalisation gives its weights, and its bias twice over.
    """
    signs = torch.ones(rows.shape[1], device=rows.device)
    signs[1::2] = -1
    signs = signs.to(dtype)
    gain = ((norm(signs[None]) - norm(-signs[None]))[0] * signs).float() / 2
    moved = (norm(signs[None] + 1) - norm(signs[None]))[0].float().abs().max() > 0.01 * gain.abs().max()
    centred = rows if moved else rows - rows.mean(1, keepdim=True)  # LayerNorm takes off the mean, RMSNorm does not
    return centred * gain
