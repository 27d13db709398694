"""SAE <-> folder, in the format that SAELens (6 and later) opens, which is also our own.

- `cfg.json`: what the SAE is. Written last: a folder without it is incomplete.
- `sae_weights.safetensors`: W_enc, b_enc, W_dec and b_dec, with every normalisation folded in.
- `sparsity.safetensors`: log10 of how often each latent fired.

A transcoder's architecture is `transcoder`, for ReLU, or `<architecture>_transcoder`, with `skip_` before `transcoder`
where it has a skip connection. SAELens knows those of ReLU and of jumprelu.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

import saepipe
from saepipe import durable, saes
from saepipe.errors import UserError, unknown
from saepipe.hook_names import split_head, with_head
from saepipe.saes.base import SAE
from saepipe.saes.token_norm import TOKEN_NORMS

CONFIG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
# SAELens drops the metadata of what says an older version than 6, and takes the folder for one of its own old ones.
# This is the version that the folder was checked against: it opens there, and encodes and decodes the same.
SAE_LENS_VERSION = "6.54.0"
SIGN = f"{CONFIG} and {WEIGHTS}"
_UNSCALED = {"norm_scale": torch.ones(()), "target_scale": torch.ones(())}
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
        UserError: A weight is not finite.
    """
    folder = Path(folder)
    values, weights = sae.folded()
    dtype = sae.W_enc.dtype
    weights = {name: value.to("cpu", dtype).contiguous() for name, value in weights.items()}
    _check_finite(weights, "the SAE to export", "go back to a checkpoint from before it diverged")
    if sae.is_transcoder:
        values["architecture"] = _transcoder_name(values["architecture"], skip=sae.cfg.skip_connection)
    config = {
        **values,
        "dtype": str(dtype).removeprefix("torch."),
        "device": "cpu",
        "metadata": {
            **_with_head_index(metadata),
            "sae_lens_version": SAE_LENS_VERSION,
            "sae_lens_training_version": None,  # else SAELens writes its own version here
            "saepipe_version": saepipe.__version__,
            "training_architecture": sae.cfg.architecture,
            "training_architecture_details": dataclasses.asdict(sae.cfg),
        },
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    (folder / CONFIG).unlink(missing_ok=True)
    durable.write(folder / WEIGHTS, lambda file: file.write(serialise(weights)))
    (folder / SPARSITY).unlink(missing_ok=True)
    if sparsity is not None:
        logs = torch.log10(sparsity.detach().to("cpu", torch.float32) + 1e-10)  # SAELens's floor
        durable.write(folder / SPARSITY, lambda file: file.write(serialise({"sparsity": logs})))
    durable.write_text(folder / CONFIG, text)


def load(folder: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> SAE:
    """Open an exported SAE: ours, or one that SAELens wrote.

    Args:
        folder: Folder with `cfg.json` and `sae_weights.safetensors`.
        device: Where to put it.
        dtype: Type of the weights.

    Returns:
        The SAE; `cfg` says how it was trained where that is known, `metadata` on what.

    Raises:
        UserError: There is no such export, or something in it is missing, damaged or unknown.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder} is no exported SAE, it has no {name}; give the sae folder of a finished run")
    config = _read_config(folder / CONFIG)
    sae = _build(config, folder / CONFIG).to(dtype)  # before the weights come, so that float64 stays what it was
    sae.load_state_dict(_read_weights(folder / WEIGHTS, sae) | _UNSCALED)
    sae.metadata = _with_head_in_name(config["metadata"])
    sae.token_norm = config["normalize_activations"]
    if (folder / SPARSITY).is_file():
        sae.log_sparsity = _read_sparsity(folder / SPARSITY, sae.d_sae)
    return sae.to(device).requires_grad_(False)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged, it holds no JSON object; export the SAE again")
    config.setdefault("metadata", {})
    kinds = {"architecture": str, "d_in": int, "d_sae": int, "metadata": dict}
    if str(config.get("architecture")).endswith("transcoder"):
        kinds["d_out"] = int
    for key, kind in kinds.items():
        if not isinstance(config.get(key), kind) or (kind is int and config[key] < 1):
            raise UserError(f"{path} has no valid {key} (found {config.get(key)}); export again, with SAELens >= 6")
    for key in ("normalize_activations", "reshape_activations"):
        known = TOKEN_NORMS if key == "normalize_activations" else ("none", "hook_z")  # joining heads needs no telling
        if config.setdefault(key, "none") not in known:
            raise UserError(f"{path} says {key}={config[key]}, which is not in the weights; fold it and write none")
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


def _build(config: dict[str, Any], path: Path) -> SAE:
    """Make the SAE that `config` describes: as it was trained where the metadata tells, overruled by what it is now."""
    name = config["architecture"]
    transcoders = {_transcoder_name(one, skip=skip): (one, skip) for one in saes.registered() for skip in (False, True)}
    if name not in [*saes.registered(), *transcoders]:
        raise unknown("architecture", name, [*saes.registered(), *transcoders], f"It is from {path}.")
    architecture, skip = transcoders.get(name, (name, False))
    sae_class = saes.architecture(architecture)
    trained = config["metadata"].get("training_architecture_details")
    same = isinstance(trained, dict) and trained.get("architecture") == architecture
    values = {"apply_b_dec_to_input": name not in transcoders} | (trained if same else {}) | config
    values |= {"architecture": architecture, "skip_connection": skip}
    known = {field.name for field in dataclasses.fields(sae_class.config_class)}
    try:
        cfg = sae_class.config_class(**{key: value for key, value in values.items() if key in known})
        return sae_class(cfg, config["d_in"], config["d_out"] if name in transcoders else None)
    except (TypeError, UserError) as error:
        raise UserError(f"{path} does not describe a {name} SAE: {error}") from error


def _read_weights(path: Path, sae: SAE) -> dict[str, Tensor]:
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); export the SAE again") from error
    wanted = {name: tuple(value.shape) for name, value in sae.named_parameters()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            raise UserError(
                f"{path} has {name} of shape {found.get(name, '(missing)')} where {CONFIG} beside it asks for "
                f"{wanted.get(name, '(no such tensor)')}; export the SAE again"
            )
    _check_finite(weights, str(path), "export the SAE again")
    return weights


def _read_sparsity(path: Path, d_sae: int) -> Tensor:
    try:
        logs = load_file(path)["sparsity"]
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); export the SAE again, or delete the file") from error
    if tuple(logs.shape) != (d_sae,):
        raise UserError(f"{path} is of {tuple(logs.shape)} latents, not of {d_sae}; export again, or delete the file")
    return logs


def _check_finite(weights: dict[str, Tensor], where: str, cure: str) -> None:
    for name, value in weights.items():
        if not torch.isfinite(value).all():
            raise UserError(f"{name} of {where} holds NaN or infinity; {cure}")
