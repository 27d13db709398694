"""SAE <-> folder, in the format that SAELens (6 and later) opens, which is also our own.

- `cfg.json`: what the SAE is. Written last: a folder without it is incomplete.
- `sae_weights.safetensors`: W_enc, b_enc, W_dec and b_dec, with every normalisation folded in.
- `sparsity.safetensors`: log10 of how often each latent fired.

A transcoder's architecture is `transcoder`, for ReLU, or `<architecture>_transcoder`, with `skip_` before `transcoder`
where it has a skip connection. SAELens knows those of ReLU and of jumprelu.

Folders that SAELens before version 6 wrote (`saelens5`), and checkpoints of its training (`saelens_training`), open
as well.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import saepipe
from saepipe import saes
from saepipe.errors import UserError, unknown
from saepipe.formats import assembling, reading, saelens5, saelens_training, writing
from saepipe.formats.assembling import Found
from saepipe.hook_names import split_head, with_head
from saepipe.saes.base import SAE

log = logging.getLogger(__name__)

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
# SAELens drops the metadata of what says an older version than 6, and takes the folder for one of its own old ones.
# This is the version that the folder was checked against: it opens there, and encodes and decodes the same.
SAE_LENS_VERSION = "6.54.0"
SIGN = f"{CONFIG} and {WEIGHTS}"
SPARSITY_FLOOR = 1e-10
"""What SAELens adds to a sparsity before it takes the logarithm."""
_AS_TRAINED = {"batchtopk": "batchtopk", "matryoshka_batchtopk": "matryoshka"}
"""SAELens's names for what only its training checkpoints have (it exports them as jumprelu) -> ours."""
_KNOWN_THERE = (
    "standard gated topk jumprelu transcoder skip_transcoder jumprelu_transcoder jumprelu_skip_transcoder"
).split()
_THRESHOLDS = {"topk_threshold": "threshold"}
_HOOKS = {"hook_name": "hook_head_index", "hook_name_out": "hook_head_index_out"}
"""Keys of the metadata that name a hook -> those that SAELens names a single head of it by."""


def recognises(path: Path) -> bool:
    """Whether SAELens, or saepipe, wrote a folder."""
    return (path / WEIGHTS).is_file()


def save(
    sae: SAE, folder: str | Path, *, metadata: dict[str, Any], sparsity: Float[Tensor, " d_sae"] | None = None
) -> None:
    """Write an SAE that takes raw activations, whatever it was normalised by.

    Args:
        sae: The SAE; it stays as it is.
        folder: Where to; an export that is there is replaced, and at no time do old and new parts open together.
        metadata: What it was trained on, under SAELens's names (model_name, hook_name, context_size ...).
        sparsity: Fraction of the tokens on which each latent fired.

    Raises:
        UserError: A weight is not finite, the sparsity is of another width, or the metadata is no JSON.
    """
    values, folded = sae.folded()
    weights = writing.finished(sae, folded)
    values["architecture"] = _name_there(sae, values["architecture"])
    if not saelens_knows(sae):
        log.warning(
            "%s: SAELens %s has no architecture %s, so that this opens in saepipe alone",
            *(folder, SAE_LENS_VERSION, values["architecture"]),
        )
    config = {
        **values,
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "metadata": {
            **writing.record(sae, _with_head_index(metadata)),
            "sae_lens_version": SAE_LENS_VERSION,
            "sae_lens_training_version": None,  # else SAELens writes its own version here
            "saepipe_version": saepipe.__version__,
        },
    }
    logs = None
    if sparsity is not None:
        if tuple(sparsity.shape) != (sae.d_sae,):
            raise UserError(
                f"sparsity is of {tuple(sparsity.shape)} latents, and the SAE has {sae.d_sae}; give one each"
            )
        logs = torch.log10(sparsity.detach().to("cpu", torch.float64) + SPARSITY_FLOOR).float()
    files = {
        WEIGHTS: writing.tensors(weights),
        SPARSITY: None if logs is None else writing.tensors({"sparsity": logs}),
    }
    writing.folder(Path(folder), CONFIG, config, files)


def saelens_knows(sae: SAE) -> bool:
    """Say whether SAELens has a class for an SAE, as `save` writes it."""
    written = "jumprelu" if sae.cfg.architecture in _AS_TRAINED.values() else sae.cfg.architecture
    return _name_there(sae, written) in _KNOWN_THERE


def _name_there(sae: SAE, architecture: str) -> str:
    """Name an SAE's architecture as SAELens does, which has names of their own for transcoders."""
    return _transcoder_name(architecture, skip=sae.cfg.skip_connection) if sae.is_transcoder else architecture


def load(
    folder: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    norm_scale: float | None = None,
) -> SAE:
    """Open an exported SAE: ours, or one that SAELens wrote.

    Args:
        folder: Folder with `cfg.json` and `sae_weights.safetensors`.
        device: Where to put it.
        dtype: Type of the weights.
        norm_scale: What inputs are to be multiplied by where the folder asks for that, and does not say by what.

    Returns:
        The SAE; `cfg` says how it was trained where that is known, `metadata` on what.

    Raises:
        UserError: There is no such export, or something in it is missing, damaged or unknown.
    """
    config_path, weights_path = reading.find(folder, CONFIG, WEIGHTS)
    config = _read_config(config_path)
    weights = saelens5.finetuned(config, reading.safetensors(weights_path), weights_path)
    if config["architecture"] in _AS_TRAINED:
        weights = {_THRESHOLDS.get(name, name): tensor for name, tensor in weights.items()}
    found = _describe(config, config_path)
    if found.architecture == "gated":
        weights.pop("b_enc", None)  # SAELens before 6 wrote one, and never used it
    kind = config["normalize_activations"]
    found, weights = saelens_training.normalised(kind, found, weights, weights_path, norm_scale)
    sae = assembling.assemble(found, weights, weights_path, device=device, dtype=dtype)
    if (weights_path.parent / SPARSITY).is_file():
        sae.log_sparsity = _read_sparsity(weights_path.parent / SPARSITY, sae.d_sae)
    return sae


def _read_config(path: Path) -> dict[str, Any]:
    config = reading.json_object(path)
    if "metadata" not in config:
        config = saelens5.current(config, path)
    for key, kind in {"architecture": str, "d_in": int, "d_sae": int, "metadata": dict}.items():
        reading.value(config, key, kind, path)
    if config["architecture"].endswith("transcoder"):
        reading.value(config, "d_out", int, path)
    if config["architecture"].startswith("topk"):
        reading.value(config, "k", int, path)
    config.setdefault("normalize_activations", "none")
    if config.setdefault("reshape_activations", "none") not in ("none", "hook_z"):  # joining heads needs no telling
        raise UserError(
            f"{path} says reshape_activations={config['reshape_activations']}, which is not in the weights; join the "
            "activations and write none"
        )
    return config


def _with_head_index(metadata: dict[str, Any]) -> dict[str, Any]:
    """Name a single head as SAELens does: the hook of all heads in one place, the head's number in another."""
    found = {key: split_head(metadata[key]) for key in _HOOKS if isinstance(metadata.get(key), str)}
    return metadata | {
        name: value for key, parts in found.items() for name, value in zip((key, _HOOKS[key]), parts, strict=True)
    }


def _with_head_in_name(metadata: dict[str, Any]) -> dict[str, Any]:
    """Name a single head as `model.hooks` does, whoever wrote the metadata."""
    found = {key: (metadata.get(key), metadata.get(index)) for key, index in _HOOKS.items()}
    return metadata | {
        key: with_head(hook, head)
        for key, (hook, head) in found.items()
        if isinstance(hook, str) and isinstance(head, int)
    }


def _transcoder_name(architecture: str, *, skip: bool) -> str:
    parts = [architecture if architecture != "standard" else "", "skip" if skip else "", "transcoder"]
    return "_".join(part for part in parts if part)


def _describe(config: dict[str, Any], path: Path) -> Found:
    """Say what `config` describes: as it was trained where the metadata tells, overruled by what it is now."""
    name = config["architecture"]
    ours = {one: (one, False) for one in saes.registered()} | {one: (to, False) for one, to in _AS_TRAINED.items()}
    transcoders = {_transcoder_name(one, skip=skip): (one, skip) for one in saes.registered() for skip in (False, True)}
    if name not in ours | transcoders:
        raise unknown("architecture", name, [*saes.registered(), *transcoders], f"It is from {path}.")
    architecture, skip = (ours | transcoders)[name]
    trained = config["metadata"].get("training_architecture_details")
    same = isinstance(trained, dict) and trained.get("architecture") == architecture
    # SAELens did not rescale before it had the key.
    values = {"apply_b_dec_to_input": name not in transcoders, "rescale_acts_by_decoder_norm": False}
    values |= (trained if same else {}) | config
    return Found(
        path,
        architecture,
        config["d_in"],
        config["d_sae"],
        config["d_out"] if name in transcoders else None,
        values | {"skip_connection": skip},
        _with_head_in_name(config["metadata"]),
    )


def _read_sparsity(path: Path, d_sae: int) -> Tensor:
    logs = reading.safetensors(path).get("sparsity", torch.empty(0))
    if tuple(logs.shape) != (d_sae,):
        raise UserError(f"{path} is of {tuple(logs.shape)} latents, not of {d_sae}; export again, or delete the file")
    return logs
