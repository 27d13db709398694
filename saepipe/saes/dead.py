"""Ways to bring dead latents back that suit every architecture: a gradient of their own, or new weights."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from saepipe.saes.base import SAE

_PART_TOKENS = 1024  # rows that are encoded at once


def ghost_error(
    hidden_pre: Float[Tensor, "token dead"], rows: Float[Tensor, "dead d_out"], residual: Float[Tensor, "token d_out"]
) -> Float[Tensor, " token"]:
    """Squared error of what dead latents, made active by an exponential, reconstruct of the others' error.

    For each token by itself: their reconstruction has half the residual's norm, and the error is as large as the
    residual's own square. Neither scale has a gradient.

    Source: Anthropic's circuits update of January 2024, and SAELens's code of that year, of which two details differ:
    the square is scaled as a whole and not by channel, and the largest exponent of a token is subtracted first, which
    its norm takes back: exp(89) is no float32.

    Args:
        hidden_pre: Pre-activations of the dead latents.
        rows: Their decoder rows.
        residual: Target without the reconstruction, detached.
    """
    tiny = torch.finfo(residual.dtype).tiny
    hidden_pre = hidden_pre.to(residual.dtype)
    ghost = (torch.exp(hidden_pre - hidden_pre.detach().amax(1, keepdim=True)) @ rows).to(residual.dtype)
    norm = ghost.detach().norm(dim=1)
    scale = torch.where(norm > 0, residual.norm(dim=1) / (2 * norm).clamp_min(tiny), 0)
    missed = (residual - scale[:, None] * ghost).square().sum(1)
    own = residual.square().sum(1)
    return missed * (own / missed.detach().clamp_min(tiny))


def ghost(
    sae: "SAE",
    centred: Float[Tensor, "token d_in"],
    residual: Float[Tensor, "token d_out"],
    latents: Int[Tensor, " dead"],
) -> Float[Tensor, ""]:
    """Ghost gradients: the mean of `ghost_error`, from products that are dense over the dead latents alone.

    Args:
        sae: The SAE.
        centred: Normalised and centred input.
        residual: Target without the reconstruction, detached.
        latents: Indices of the dead latents.
    """
    if not len(latents):
        return residual.new_zeros(())
    errors = ghost_error(sae._hidden_pre_of(centred, latents), sae.W_dec.index_select(0, latents), residual)
    return errors.mean() / (1 if sae.cfg.mse_reduction == "sum" else sae.d_out)


def draw(errors: Float[Tensor, " token"], most: int, generator: torch.Generator) -> Int[Tensor, " drawn"]:
    """Draw rows without replacement, each with a probability proportional to the square of its squared error.

    Args:
        errors: Squared error of each row.
        most: How many rows; fewer where not as many have an error.
        generator: A generator of the CPU, where rows are drawn, so that every rank draws the same.
    """
    weights = errors.detach().to("cpu", torch.float64)
    weights = (weights / weights.max().clamp_min(torch.finfo(torch.float64).tiny)).square()
    most = min(most, int((weights > 0).sum()))
    if not most:
        return torch.zeros(0, dtype=torch.int64, device=errors.device)
    return torch.multinomial(weights, most, generator=generator).to(errors.device)


@torch.no_grad()
def resample(
    sae: "SAE", x: Tensor, y: Tensor, errors: Tensor, latents: Tensor, generator: torch.Generator
) -> Int[Tensor, " reset"]:
    """Do what `SAE.resample` says."""
    rows = draw(errors, len(latents), generator)
    reset = latents[: len(rows)]
    target = sae._normalise_target(y[rows])
    if sae.is_transcoder:
        wanted = target - torch.cat([sae._normalise_target(sae(part)) for part in x[rows].split(_PART_TOKENS)])
    else:
        wanted = target - sae.b_dec
    inputs = sae._centre(sae._normalise(x[rows]))
    live = torch.ones(sae.d_sae, dtype=torch.bool, device=sae.W_dec.device).index_fill_(0, latents, False)
    encoder_norm, decoder_norm = (
        # All are dead: as at the start.
        weights[live].norm(dim=1).mean() if live.any() else weights.new_tensor(sae.start_norm)
        for weights in (sae.W_enc.T, sae.W_dec)
    )
    sae.W_enc[:, reset] = sae.cfg.resample_scale * encoder_norm * functional.normalize(inputs, dim=1).T
    sae.W_dec[reset] = decoder_norm * functional.normalize(wanted, dim=1)
    for name in sae.latent_parameters:
        sae.get_parameter(name)[reset] = sae._start_of(name)
    return reset
