"""What the formats share that are written: weights for raw activations, and folders that never open as a mixture."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors.torch import save as serialise
from torch import Tensor

from saepipe import durable
from saepipe.errors import UserError
from saepipe.formats.assembling import TRANSPOSED
from saepipe.formats.reading import check_finite
from saepipe.saes.base import SAE

Write = Callable[[BinaryIO], object]


def centred(values: Mapping[str, Any], weights: dict[str, Tensor], *, wanted: bool) -> dict[str, Tensor]:
    """Subtract b_dec from the input of an autoencoder or not, with biases of the encoder that make it the same.

    Args:
        values: Configuration that `SAE.folded` gave.
        weights: The float64 weights that it gave.
        wanted: Whether the other library subtracts b_dec from the input.
    """
    if values["apply_b_dec_to_input"] == wanted:
        return weights
    shift = (1 if wanted else -1) * (weights["b_dec"] @ weights["W_enc"])
    shifts = {"b_enc": shift, "b_gate": shift}
    if "r_mag" in weights:
        shifts["b_mag"] = shift * weights["r_mag"].exp()
    return weights | {name: weights[name] + by for name, by in shifts.items() if name in weights}


def folded(sae: SAE, library: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give what `SAE.folded` gives, for a library that knows no normalisation of each token.

    Args:
        sae: The SAE.
        library: Whose format it is for.

    Raises:
        UserError: The SAE normalises each token.
    """
    if sae.token_norm != "none":
        raise refuse(sae, library, f"has no normalize_activations={sae.token_norm}")
    return sae.folded()


def finished(sae: SAE, weights: Mapping[str, Tensor], names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """Give float64 weights the SAE's type, and the names and sides of another library.

    Args:
        sae: The SAE that they are of.
        weights: Its weights.
        names: As `assembling.renamed` takes them; None keeps our own.

    Raises:
        UserError: A weight is not finite.
    """
    names = {name: name for name in weights} if names is None else names
    cast = {ours: weights[ours].to("cpu", sae.W_enc.dtype) for ours in names}
    check_finite(cast, "the SAE to export", "go back to a checkpoint from before it diverged")
    return {
        theirs.removesuffix(TRANSPOSED): (cast[ours].T if theirs.endswith(TRANSPOSED) else cast[ours]).contiguous()
        for ours, theirs in names.items()
    }


def tensors(weights: dict[str, Tensor]) -> Write:
    """Write a safetensors file."""
    return lambda file: file.write(serialise(weights))


def pickled(content: dict[str, Tensor]) -> Write:
    """Write tensors by name as `torch.save` does."""
    return lambda file: torch.save(content, file)


def folder(path: Path, config_name: str, config: dict[str, Any], files: Mapping[str, Write | None]) -> None:
    """Write a folder so that at no time what is old in it and what is new open together.

    Args:
        path: The folder.
        config_name: File without which it does not open; it goes first and comes last.
        config: What that file says.
        files: Name -> what writes it, or None where it must not be there.

    Raises:
        UserError: The configuration is no JSON.
    """
    try:
        text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the SAE's metadata is no JSON ({error}); keep texts, numbers, lists and dicts in it"
        ) from error
    (path / config_name).unlink(missing_ok=True)
    for name, write in files.items():
        if write is None:
            (path / name).unlink(missing_ok=True)
        else:
            durable.write(path / name, write)
    durable.write_text(path / config_name, text)


def record(sae: SAE, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata with how the SAE was trained: as it says itself where that is known, else by its configuration.

    An SAE that was opened has the keys of training at their defaults where its file did not say: they are left out.

    Args:
        sae: The SAE.
        metadata: What it was trained on.
    """
    if "training_architecture" in metadata or "training_architecture_details" in metadata:
        return dict(metadata)
    own = {"training_architecture": str(sae.cfg.architecture)}
    details = {} if sae.opened else {"training_architecture_details": dataclasses.asdict(sae.cfg)}
    return dict(metadata) | own | details


def refuse(sae: SAE, library: str, reason: str) -> UserError:
    """Build the error for an SAE that a format has no words for.

    Args:
        sae: The SAE.
        library: Whose format it is.
        reason: What the library cannot do.
    """
    kind = f"{sae.cfg.architecture} {'transcoder' if sae.is_transcoder else 'SAE'}"
    return UserError(f"this {kind} cannot be written for {library}, which {reason}; export it as saelens")
