"""Checkpoints of SAELens's training: weights before the normalisation of activations is folded into them.

- `activation_scaler.json`: what inputs were multiplied by.
- `activation_whitening.safetensors`: mean, matrix and inverse matrix of a whitening of inputs.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from saepipe.errors import UserError
from saepipe.formats import assembling, reading
from saepipe.formats.assembling import Found
from saepipe.saes.token_norm import TOKEN_NORMS

SCALER, WHITENING = "activation_scaler.json", "activation_whitening.safetensors"


def normalised(
    kind: str, found: Found, weights: dict[str, Tensor], weights_path: Path, norm_scale: float | None
) -> tuple[Found, dict[str, Tensor]]:
    """Do what `normalize_activations` says, with the files that lie beside the weights.

    Args:
        kind: Its value.
        found: What the SAE is.
        weights: Its weights.
        weights_path: Where they are from.
        norm_scale: What inputs were multiplied by, where no file says it.

    Raises:
        UserError: What the SAE was normalised by is not there, or contradicts its configuration.
    """
    folder = weights_path.parent
    factor = reading.json_object(folder / SCALER).get("scaling_factor") if (folder / SCALER).is_file() else None
    if norm_scale is not None and (kind != "expected_average_only_in" or factor is not None):
        raise UserError(
            f"norm_scale={norm_scale} is for an SAE that leaves it open, which {folder} does not; leave it out"
        )
    factor = norm_scale if factor is None else factor
    if kind == "expected_average_only_in" and isinstance(factor, float | int):
        return replace(found, norm_scale=float(factor)), weights
    if kind == "covariance_whitening" and (folder / WHITENING).is_file():
        return _unwhitened(found, weights, weights_path)
    if kind not in TOKEN_NORMS:
        raise UserError(
            f"{found.path} says normalize_activations={kind}, which is not in the weights, nor in {SCALER} or "
            f"{WHITENING} beside them; give norm_scale where you know what inputs are multiplied by, or fold it and "
            "write none"
        )
    if factor is not None:
        raise UserError(
            f"{folder / SCALER} says scaling_factor={factor} where {found.path.name} says "
            f"normalize_activations={kind}; delete the file if the weights take raw activations"
        )
    return replace(found, token_norm=kind), weights


def _unwhitened(found: Found, weights: dict[str, Tensor], path: Path) -> tuple[Found, dict[str, Tensor]]:
    """Fold (x - mean) @ matrix, and its inverse behind the decoder, into the weights."""
    if found.d_out is not None:
        raise UserError(f"{found.path} says normalize_activations=covariance_whitening of a transcoder; fold it")
    whitening = reading.safetensors(path.with_name(WHITENING))
    for name, axes in {"mean": 1, "matrix": 2, "inverse_matrix": 2}.items():
        due = (found.d_in,) * axes
        if name not in whitening or tuple(whitening[name].shape) != due:
            raise UserError(f"{path.with_name(WHITENING)} has no {name} of shape {due}; {reading.AGAIN}")
    reading.check_finite(whitening, str(path.with_name(WHITENING)), reading.AGAIN)
    # The norms of decoder rows first: unwhitening changes them, and with them which latents are kept.
    found, weights = assembling.unnormalised(found, weights, path)
    mean, matrix, inverse = (whitening[name].double() for name in ("mean", "matrix", "inverse_matrix"))
    encoder = matrix @ weights["W_enc"]
    if not found.values["apply_b_dec_to_input"]:  # else the new b_dec takes the mean off the input
        shift = mean @ encoder
        scales = {"b_enc": torch.ones_like(shift), "b_gate": torch.ones_like(shift)}
        if "r_mag" in weights:
            scales["b_mag"] = weights["r_mag"].exp()
        weights |= {name: weights[name] - shift * by for name, by in scales.items() if name in weights}
    weights |= {"W_enc": encoder, "W_dec": weights["W_dec"] @ inverse, "b_dec": weights["b_dec"] @ inverse + mean}
    return found, weights
