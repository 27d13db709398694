"""What SAELens wrote before version 6: a flat `cfg.json`, without `metadata`, under other names.

The names changed from version to version; a folder may have any of them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saepipe.errors import UserError

_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn": "activation_fn_str",
}
_METADATA = (
    "model_name model_class_name model_from_pretrained_kwargs hook_name hook_layer hook_head_index hook_name_out "
    "hook_head_index_out context_size prepend_bos seqpos_slice exclude_special_tokens dataset_path neuronpedia_id "
    "sae_lens_version sae_lens_training_version"
).split()
_FACTORS = ("scaling_factor", "finetuning_scaling_factor")


def current(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Say what an old configuration says in the way of version 6.

    Args:
        config: What `cfg.json` holds, without `metadata`.
        path: Where it is, for errors.

    Raises:
        UserError: It has an activation function that no architecture here has.
    """
    flat = {_RENAMED.get(key, key): item for key, item in config.items()}
    flat.setdefault("architecture", "standard")
    activation, options = flat.get("activation_fn_str") or "relu", flat.get("activation_fn_kwargs") or {}
    if activation == "topk" and flat["architecture"] in ("standard", "topk") and not options.get("signed"):
        flat |= {"architecture": "topk", "k": options.get("k", flat.get("k"))}
    elif activation != "relu":
        raise UserError(
            f"{path} says activation_fn={activation} {options or ''} of a {flat['architecture']} SAE, which no "
            "architecture here has; choose an SAE with relu or topk"
        )
    normalised = flat.get("normalize_activations")
    if normalised is None or isinstance(normalised, bool):
        flat["normalize_activations"] = "expected_average_only_in" if normalised else "none"
    metadata = {key: flat[key] for key in _METADATA if key in flat}
    return flat | {"metadata": {"prepend_bos": True} | metadata}


def finetuned(config: dict[str, Any], weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Fold into the decoder what latents are multiplied by before it, which finetuning trained.

    Args:
        config: What `cfg.json` holds.
        weights: What the file of the weights holds.
        path: Where it is, for errors.

    Raises:
        UserError: There are factors, but the configuration does not say that they are used.
    """
    factors = next((weights[name] for name in _FACTORS if name in weights), None)
    if factors is None:
        return weights
    kept = {name: tensor for name, tensor in weights.items() if name not in _FACTORS}
    if torch.equal(factors, torch.ones_like(factors)):
        return kept
    if not config.get("finetuning_scaling_factor") or factors.shape != kept["W_dec"].shape[:1]:
        raise UserError(
            f"{path} has a scaling_factor of shape {tuple(factors.shape)}, where cfg.json beside it says "
            f"finetuning_scaling_factor={config.get('finetuning_scaling_factor')}; fetch it again, or say which holds"
        )
    return kept | {"W_dec": (kept["W_dec"].double() * factors.double()[:, None])}
