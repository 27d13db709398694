"""The weights that training starts with: drawn at random, or those of another SAE that takes raw activations."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from saepipe.errors import UserError

if TYPE_CHECKING:
    from saepipe.saes.base import SAE


@torch.no_grad()
def initialise(
    sae: "SAE", generator: torch.Generator, mean: Tensor | None, norm_scale: float, target_scale: float | None
) -> None:
    """Do what `SAE.initialise` says."""
    assert sae.is_transcoder or target_scale is None
    scales = (norm_scale, norm_scale if target_scale is None else target_scale)
    for buffer, scale in zip((sae.norm_scale, sae.target_scale), scales, strict=True):
        buffer.fill_(1.0 if sae.cfg.normalize_activations == "none" else scale)
    rows = torch.randn(sae.W_dec.shape, generator=generator, device=generator.device)
    sae.W_dec.copy_(sae.start_norm * functional.normalize(rows, dim=1))
    # A transcoder's encoder reads another space, so it starts in directions of its own.
    if sae.is_transcoder:
        rows = torch.randn((sae.d_sae, sae.d_in), generator=generator, device=generator.device)
    sae.W_enc.copy_((sae.start_norm * functional.normalize(rows, dim=1)).T)
    for name in sae.latent_parameters:
        sae.get_parameter(name).fill_(sae._start_of(name))
    sae.b_dec.zero_()
    if mean is not None:
        sae.b_dec.copy_(mean.to(sae.b_dec) * sae.target_scale)
    if sae.W_skip is not None:
        sae.W_skip.zero_()


@torch.no_grad()
def adopt(sae: "SAE", other: "SAE") -> None:
    """Do what `SAE.adopt` says."""
    for what in ("d_in", "d_out", "d_sae", "is_transcoder"):
        if getattr(sae, what) != getattr(other, what):
            key = "sae.d_sae" if what == "d_sae" else "stream.hook and stream.target_hook"
            raise UserError(
                f"train.init_from has an SAE with {what}={getattr(other, what)}, where this run's has "
                f"{getattr(sae, what)}; change {key}, or start from another one"
            )
    for key in ("apply_b_dec_to_input", "skip_connection"):
        if (theirs := getattr(other.cfg, key)) != getattr(sae.cfg, key):
            raise UserError(f"train.init_from has an SAE with {key}={theirs}; set sae.{key}={str(theirs).lower()}")
    _, weights = other.folded()
    parameters, threshold = dict(sae.named_parameters()), dict(sae.named_buffers()).get("threshold")
    known = {*parameters, *(["threshold"] if threshold is not None else [])}
    for name in (*parameters, *weights):
        if name not in weights or name not in known:
            has = "has no" if name not in weights else "has a"
            needs = "needs" if name not in weights else "would leave out"
            raise UserError(
                f"train.init_from {has} {name}, which sae={sae.cfg.architecture} {needs}; it is a "
                f"{other.cfg.architecture} SAE: choose sae={other.cfg.architecture}, or start from another one"
            )
    for name, parameter in parameters.items():
        parameter.copy_(_normalised(sae, name, weights[name]))
    if threshold is not None and "threshold" in weights:
        # One for all latents, on what they are ranked by; where rows are held at norm 1, it is in their encoders.
        by_norm = sae.cfg.rescale_acts_by_decoder_norm or sae.cfg.normalize_sae_decoder
        ranked_by = sae.W_dec.norm(dim=1) if by_norm else torch.ones_like(sae.W_dec[:, 0])
        threshold.copy_((weights["threshold"].to(threshold) * ranked_by).mean())
    if sae.cfg.normalize_sae_decoder:
        norm = sae.W_dec.norm(dim=1).clamp_min(torch.finfo(sae.W_dec.dtype).tiny)
        sae.W_dec.div_(norm[:, None])
        sae.W_enc.mul_(norm)
        for name in sae.latent_parameters:
            if name != "r_mag":  # a factor, and no pre-activation
                sae.get_parameter(name).mul_(norm)


def _normalised(sae: "SAE", name: str, raw: Tensor) -> Tensor:
    """Undo what `SAE.folded` does to a weight."""
    scale, target_scale = sae.norm_scale.double(), sae.target_scale.double()
    factors = {"W_enc": 1 / scale, "W_dec": target_scale, "b_dec": target_scale, "W_skip": target_scale / scale}
    return raw * factors.get(name, torch.ones_like(scale))
