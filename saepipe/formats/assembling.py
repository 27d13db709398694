"""What a format found in a folder -> SAE: one that takes raw activations, or a sentence about why there is none.

No memory is spent on an SAE before the shapes of all its tensors are known to fit.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saepipe import saes
from saepipe.errors import UserError
from saepipe.formats import reading
from saepipe.saes.base import SAE

TRANSPOSED = ".T"
"""What follows the name of a tensor that another library keeps transposed."""
WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SCALES = ("norm_scale", "target_scale")


def renamed(
    path: Path, tensors: Mapping[str, Any], names: Mapping[str, str], *, ignored: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Give another library's tensors our names and sides.

    Args:
        path: File that they are from, for the error.
        tensors: Its tensors.
        names: Our name -> theirs, with TRANSPOSED behind it where their matrix lies the other way.
        ignored: Names that may be there and say nothing about what the SAE does.

    Raises:
        UserError: A tensor is missing, foreign, or no matrix where one is due.
    """
    wanted = {ours: theirs.removesuffix(TRANSPOSED) for ours, theirs in names.items()}
    foreign = sorted(set(map(str, tensors)) - set(wanted.values()) - set(ignored))
    if foreign:
        raise UserError(f"{path} has {', '.join(foreign[:5])}, which an SAE of its kind does not have; {reading.AGAIN}")
    found = {}
    for ours, theirs in wanted.items():
        tensor = tensors.get(theirs)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path} has no tensor {theirs}; {reading.AGAIN}")
        if ours.startswith("W_") and tensor.ndim != 2:
            raise UserError(f"{path} has {theirs} of shape {tuple(tensor.shape)}, which is no matrix; {reading.AGAIN}")
        found[ours] = tensor.T if names[ours].endswith(TRANSPOSED) else tensor
    return found


@dataclass
class Found:
    """What a folder or file says that an SAE is."""

    path: Path
    """The file that says it."""
    architecture: str
    """Name of ours."""
    d_in: int
    d_sae: int
    d_out: int | None = None
    """Makes it a transcoder."""
    values: dict[str, Any] = field(default_factory=dict)
    """Keys of the architecture's configuration; others are left out."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What it was trained on, under SAELens's names; None where the format does not know."""
    token_norm: str = "none"
    """One of TOKEN_NORMS."""
    norm_scale: float = 1.0
    """What inputs were multiplied by; it is folded into the weights."""
    target_scale: float | None = None
    """What a transcoder's targets were multiplied by; None: as the inputs."""


def assemble(
    found: Found,
    weights: Mapping[str, Tensor],
    weights_path: Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> SAE:
    """Make an SAE that takes raw activations.

    Thresholds below 0 become 0: every library takes the ReLU of what passes its threshold.

    Args:
        found: What it is.
        weights: Its tensors under our names.
        weights_path: File that they are from, for errors.
        device: Where to put it.
        dtype: Type of the weights.

    Raises:
        UserError: The description is impossible, or a tensor is missing, foreign, of another shape, or not finite; or
            it is a transcoder that normalises each token.
    """
    if found.d_out is not None and found.token_norm != "none":
        # SAELens normalises a transcoder's input alone, and gives its skip connection what is not normalised.
        raise UserError(
            f"{found.path} says normalize_activations={found.token_norm} of a transcoder, which nothing here does; "
            "choose one that takes raw activations"
        )
    if found.norm_scale != 1 or found.target_scale not in (None, 1):
        found, weights = unnormalised(found, weights, weights_path)
    sae = _filled(found, weights, weights_path, dtype, device)
    sae.token_norm = vars(sae.cfg)["normalize_activations"] = found.token_norm
    sae.metadata = found.metadata
    sae.opened = True
    return sae.requires_grad_(False)


def unnormalised(found: Found, weights: Mapping[str, Tensor], weights_path: Path) -> tuple[Found, dict[str, Tensor]]:
    """Fold into the weights what inputs and targets were scaled by, and norms of decoder rows that rank latents.

    Returns:
        What the SAE is now (a BatchTopK has become a JumpReLU), and its weights in float64.

    Raises:
        UserError: As `assemble`.
    """
    for scale in (found.norm_scale, found.target_scale):
        if scale is not None and not 0 < scale < math.inf:
            raise UserError(f"{found.path} normalises activations by {scale}, which is no scale; {reading.AGAIN}")
    sae = _filled(found, weights, weights_path, torch.float64, "cpu")
    sae.norm_scale.fill_(found.norm_scale)
    sae.target_scale.fill_(found.norm_scale if found.target_scale is None else found.target_scale)
    values, folded = sae.folded()
    architecture = values["architecture"]
    # Another architecture need not know the values of this one's keys.
    kept = found.values if architecture == found.architecture else {"skip_connection": sae.cfg.skip_connection}
    return replace(found, architecture=architecture, values=kept | values, norm_scale=1.0, target_scale=None), folded


def _filled(
    found: Found, weights: Mapping[str, Tensor], path: Path, dtype: torch.dtype, device: str | torch.device
) -> SAE:
    if dtype not in WEIGHT_TYPES:
        raise UserError(f"dtype={dtype} is no type for weights; give one of {WEIGHT_TYPES}")
    empty = _described(found)
    _check_weights(empty, weights, path, found.path.name)
    # The type comes before the weights, so that float64 stays what it was.
    sae = empty.to(dtype).to_empty(device=device)
    clamped = {name: tensor.clamp(min=0) if name == "threshold" else tensor for name, tensor in weights.items()}
    sae.load_state_dict({**clamped, **dict.fromkeys(_SCALES, torch.ones(()))})
    return sae


def _described(found: Found) -> SAE:
    """Make the SAE without memory for its weights, which a file might have lied about."""
    sae_class = saes.architecture(found.architecture)
    known = {key.name: key.default for key in fields(sae_class.config_class)}
    # SAELens says None of some keys that always have a value here.
    given = {key: item for key, item in found.values.items() if key in known}
    values = {key: item for key, item in given.items() if item is not None or known[key] is None}
    values |= {"architecture": found.architecture, "d_sae": found.d_sae, "normalize_activations": "none"}
    try:
        with torch.device("meta"):
            return sae_class(sae_class.config_class(**values), found.d_in, found.d_out)
    except (TypeError, UserError, RuntimeError) as error:
        kind = f"{found.architecture} {'transcoder ' if found.d_out else ''}SAE"
        raise UserError(f"{found.path} does not describe a {kind}: {error}") from error


def _check_weights(sae: SAE, weights: Mapping[str, Tensor], path: Path, described_in: str) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in sae.state_dict().items() if name not in _SCALES}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in wanted | shapes:
        if wanted.get(name) != shapes.get(name):
            raise UserError(
                f"{path} has {name} of shape {shapes.get(name, '(missing)')} where {described_in} asks for "
                f"{wanted.get(name, '(no such tensor)')}; {reading.AGAIN}"
            )
        if weights[name].dtype not in WEIGHT_TYPES:
            raise UserError(f"{path} has {name} of type {weights[name].dtype}; save it as one of {WEIGHT_TYPES}")
    reading.check_finite(weights, str(path), reading.AGAIN)
