"""Google's Gemma Scope -> SAE: JumpReLU SAEs and transcoders.

- Gemma Scope 1: `params.npz` alone. The folders above it say which model and which hook.
- Gemma Scope 2: `config.json` and `params.safetensors`; transcoders may have `affine_skip_connection` [d_in, d_out].

Source of the skip connection's side: Google's code multiplies x @ affine_skip_connection, where SAELens 6.54 takes the
same matrix for one that it transposes. SAEs of embeddings take what TransformerLens calls hook_embed, which is scaled
by sqrt(d_in), where they were trained before that.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saepipe.errors import UserError
from saepipe.formats import assembling, reading
from saepipe.formats.assembling import Found
from saepipe.saes.base import SAE

ONE, CONFIG, TWO = "params.npz", "config.json", "params.safetensors"
SIGN = f"{ONE}, or {CONFIG} and {TWO}"
_NAMES = {name: name.lower() for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
_SKIP = {"W_skip": "affine_skip_connection.T"}
_RELEASE = re.compile(r"gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)")
_HOOKS = {
    "res": "hook_resid_post",
    "mlp": "hook_mlp_out",
    "att": "attn.hook_z",
    "transcoders": "ln2.hook_normalized",
}
_HF_HOOKS = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "pre_feedforward_layernorm.output": "mlp.input",
}
"""Their name of a place in a block -> TransformerLens's, or the side of a module."""


def recognises(path: Path) -> bool:
    """Whether a folder is of Gemma Scope, or a file its `params.npz`."""
    return path.name == ONE or (path / ONE).is_file() or (path / TWO).is_file()


def load(path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> SAE:
    """Open an SAE of Gemma Scope, 1 or 2.

    Args:
        path: Folder, or its `params.npz`.
        device: Where to put it.
        dtype: Type of the weights.

    Raises:
        UserError: Something is missing or damaged, or it is a transcoder of several layers at once.
    """
    path = Path(path)
    folder = path.parent if path.name == ONE else path
    if not (folder / ONE).is_file():
        return _two(folder, device, dtype)
    (params,) = reading.find(folder, ONE)
    arrays = {name.lower(): tensor for name, tensor in reading.npz(params).items()}
    scaling = arrays.pop("scaling_factor", torch.ones(()))
    if not torch.equal(scaling, torch.ones_like(scaling)):
        raise UserError(f"{params} has a scaling_factor other than 1, whose use is not known; choose another SAE")
    weights = assembling.renamed(params, arrays, _NAMES)
    place = params.absolute().parent.as_posix()  # a hub cache links its files to elsewhere
    if "embedding" in place.split("/"):
        scale = weights["W_enc"].shape[0] ** 0.5
        weights = {
            name: tensor / scale if name == "W_enc" else tensor * scale if name in ("W_dec", "b_dec") else tensor
            for name, tensor in weights.items()
        }
    release = _RELEASE.search(place)
    transcoder = release is not None and release[3] == "transcoders"
    found = _found(params, weights, transcoder=transcoder, metadata=_metadata(place))
    return assembling.assemble(found, weights, params, device=device, dtype=dtype)


def _two(folder: Path, device: str | torch.device, dtype: torch.dtype) -> SAE:
    config_path, params = reading.find(folder, CONFIG, TWO)
    config = reading.json_object(config_path)
    if config.get("architecture") != "jump_relu":
        raise UserError(
            f"{config_path} says architecture={config.get('architecture')}, where Gemma Scope 2 has jump_relu; "
            f"{reading.AGAIN}"
        )
    tensors = reading.safetensors(params)
    skip = "affine_skip_connection" in tensors
    if bool(config.get("affine_connection", skip)) != skip:
        raise UserError(
            f"{config_path} says affine_connection={config['affine_connection']}, and {params.name} has "
            f"{'one' if skip else 'none'}; {reading.AGAIN}"
        )
    weights = assembling.renamed(params, tensors, _NAMES | (_SKIP if skip else {}))
    hook, target = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    metadata = {
        "model_name": config.get("model_name"),
        "hf_hook_name": hook,
        "hook_name": _hook_name(hook),
        "hf_hook_name_out": target,
        "hook_name_out": _hook_name(target),
    }
    transcoder = skip or target not in (None, hook)
    metadata = {key: item for key, item in metadata.items() if item and (transcoder or "_out" not in key)}
    found = _found(config_path, weights, transcoder=transcoder, metadata=metadata, skip=skip)
    return assembling.assemble(found, weights, params, device=device, dtype=dtype)


def _found(
    path: Path, weights: dict[str, Tensor], *, transcoder: bool, metadata: dict[str, Any], skip: bool = False
) -> Found:
    d_in, d_sae = weights["W_enc"].shape
    d_out = weights["W_dec"].shape[1]
    return Found(
        path,
        "jumprelu",
        d_in,
        d_sae,
        d_out if transcoder or d_out != d_in else None,
        values={"apply_b_dec_to_input": False, "skip_connection": skip},
        metadata=metadata,
    )


def _metadata(place: str) -> dict[str, Any]:
    """Read what the folders are called: gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82."""
    release, layer = _RELEASE.search(place), re.search(r"layer_(\d+)", place)
    if release is None:
        return {}
    metadata = {"model_name": f"gemma-2-{release[1]}{'-it' if release[2] == 'it' else ''}"}
    if "embedding" in place.split("/"):
        metadata["hook_name"] = "hook_embed"
    elif layer:
        metadata["hook_name"] = f"blocks.{layer[1]}.{_HOOKS[release[3]]}"
        if release[3] == "transcoders":
            metadata["hook_name_out"] = f"blocks.{layer[1]}.hook_mlp_out"
    return metadata


def _hook_name(place: Any) -> str | None:
    found = re.fullmatch(r"(model\.layers\.(\d+))\.(.+)", str(place))
    if found is None or found[3] not in _HF_HOOKS:
        return None
    name = _HF_HOOKS[found[3]]
    return f"{found[1]}.{name}" if name == "mlp.input" else f"blocks.{found[2]}.{name}"
