"""Llama Scope -> SAE: JumpReLU SAEs and transcoders with one threshold for all latents.

- `hyperparams.json`: what it is, and the mean norms of activations that it was normalised by.
- `checkpoints/final.safetensors`: encoder.weight [d_sae, d_in], encoder.bias, decoder.weight [d_out, d_sae],
  decoder.bias.

Source: He et al. 2024 (arXiv 2410.20526) and OpenMOSS's code. Inputs are scaled to a mean norm of sqrt(d_in), targets
to sqrt(d_out), where norm_activation is dataset-wise. The threshold is one on raw activations: with
sparsity_include_decoder_norm it is compared with a latent times its decoder row's norm, both of raw targets, so that
for a latent of the scaled SAE it is threshold * target scale / norm of the row. Where all rows have norm 1, that is
what SAELens 6.54 computes for SAEs; its transcoders take the input's scale in place of the target's.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saepipe.errors import UserError
from saepipe.formats import assembling, reading
from saepipe.formats.assembling import Found
from saepipe.saes.base import SAE

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
SIGN = f"{CONFIG} and {WEIGHTS}"
_NAMES = {"W_enc": "encoder.weight.T", "b_enc": "encoder.bias", "W_dec": "decoder.weight.T"}
_BIAS = {"b_dec": "decoder.bias"}


def recognises(path: Path) -> bool:
    """Whether a folder is of Llama Scope."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> SAE:
    """Open an SAE of Llama Scope.

    Args:
        path: Folder.
        device: Where to put it.
        dtype: Type of the weights.

    Raises:
        UserError: Something is missing or damaged, or it is normalised or activated in another way than Llama Scope's.
    """
    config_path, weights_path = reading.find(path, CONFIG, WEIGHTS)
    config = reading.json_object(config_path)
    for key, known in {"act_fn": "jumprelu", "use_glu_encoder": False}.items():
        if config.get(key, known) != known:
            raise UserError(f"{config_path} says {key}={config[key]}, where only {known} is read; choose another SAE")
    d_in, d_sae = (reading.value(config, key, int, config_path) for key in ("d_model", "d_sae"))
    scale, target_scale = _scales(config, d_in, config_path)
    has_bias = config.get("use_decoder_bias", True)
    tensors = reading.safetensors(weights_path)
    weights = assembling.renamed(weights_path, tensors, _NAMES | (_BIAS if has_bias else {}))
    if not has_bias:
        weights["b_dec"] = weights["W_dec"].new_zeros(weights["W_dec"].shape[1])
    weights["threshold"] = _thresholds(config, weights["W_dec"], scale, target_scale, config_path)
    hook, target = config.get("hook_point_in"), config.get("hook_point_out")
    transcoder = target not in (None, hook)
    names = {"hook_name": hook, "hook_name_out": target if transcoder else None, "model_name": _model_name(path)}
    found = Found(
        config_path,
        "jumprelu",
        d_in,
        d_sae,
        d_in if transcoder else None,
        values={"apply_b_dec_to_input": bool(config.get("apply_decoder_bias_to_pre_encoder", False))},
        metadata={key: item for key, item in names.items() if item is not None},
        norm_scale=scale,
        target_scale=target_scale,
    )
    return assembling.assemble(found, weights, weights_path, device=device, dtype=dtype)


def _scales(config: dict[str, Any], d_in: int, path: Path) -> tuple[float, float]:
    """Find what inputs and targets were multiplied by."""
    kind = config.get("norm_activation", "dataset-wise")
    if kind == "inference":
        return 1.0, 1.0
    if kind != "dataset-wise":
        raise UserError(f"{path} says norm_activation={kind}, which is not in the weights; fold it and write inference")
    norms = reading.value(config, "dataset_average_activation_norm", dict, path)
    scales = []
    for side in ("in", "out"):
        norm = reading.value(norms, side, float, path)
        if not norm > 0:
            raise UserError(f"{path} has no valid dataset_average_activation_norm (found {norms}); {reading.AGAIN}")
        scales.append(d_in**0.5 / norm)
    return scales[0], scales[1]


def _thresholds(config: dict[str, Any], decoder: Tensor, scale: float, target_scale: float, path: Path) -> Tensor:
    threshold = reading.value(config, "jump_relu_threshold", float, path)
    if not config.get("sparsity_include_decoder_norm", True):
        return torch.full(decoder.shape[:1], threshold * scale, dtype=torch.float64)
    norms = decoder.double().norm(dim=1).clamp_min(1e-30)  # a row of zeros has no say; its latent may stay silent
    return threshold * target_scale / norms


def _model_name(path: str | Path) -> str | None:
    return "meta-llama/Llama-3.1-8B" if "Llama3_1-8B-Base" in Path(path).absolute().as_posix() else None
