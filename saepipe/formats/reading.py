"""Safe readers, which the formats share: what they open was written by strangers.

No file runs code, none unpacks to much more than it is, and no SAE is made before the shapes of all its tensors are
known to fit. Every refusal is a `UserError` that names the file, what is wrong and the cure.
"""

import json
import math
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saepipe import saes
from saepipe.errors import UserError
from saepipe.saes.base import SAE

AGAIN = "fetch or export it again"
"""Cure of a file that is damaged."""
TRANSPOSED = ".T"
"""What follows the name of a tensor that another library keeps transposed."""
WEIGHT_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Weights compress to no less than half; rows of dead latents that are all zero may shrink much, but are few.
_MOST_UNPACKED, _FREE_BYTES = 20, 64 * 2**20
_SCALES = ("norm_scale", "target_scale")


def find(folder: str | Path, *names: str) -> list[Path]:
    """Return the paths of files that a folder must have.

    Raises:
        UserError: One is missing.
    """
    folder = Path(folder)
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} is no exported SAE, it has no {name}; give a folder with {' and '.join(names)}, such as the "
                "sae folder of a finished run"
            )
    return [folder / name for name in names]


def json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file holds none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged, it holds no JSON object; {AGAIN}")
    return content


def value(config: Mapping[str, Any], key: str, kind: type, path: Path) -> Any:
    """Return a value of a JSON object that must be there; a count must be 1 or more.

    Args:
        config: The object.
        key: Its name.
        kind: `int`, `float` (an int will do), `str` or `dict`.
        path: File that the object is from, for the error.

    Raises:
        UserError: It is missing, or of another kind.
    """
    found: Any = config.get(key)
    fits = isinstance(found, (int, float) if kind is float else kind) and not isinstance(found, bool)
    if not fits or (kind is int and found < 1):
        raise UserError(f"{path} has no valid {key} (found {found}); {AGAIN}")
    return found


def safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UserError: It is truncated, or something else.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}); {AGAIN}") from error


def pickled(path: Path) -> dict[str, Any]:
    """Read the dictionary in a file of `torch.save`, without running anything that it holds.

    Raises:
        UserError: It holds more than tensors and plain values, unpacks to far more than it is, or is damaged.
    """
    _check_zip(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols, which decide nothing here
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, so that opening it could run code; where you trust it, "
            "load it with the library that wrote it and save its tensors as safetensors"
        ) from error
    except Exception as error:  # what a broken pickle raises depends on where it breaks
        raise UserError(f"{path} is damaged ({_line(error)}); {AGAIN}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, and no tensors by name; save a state_dict")
    for name, tensor in content.items():
        if isinstance(tensor, Tensor) and tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path} has {name} of shape {tuple(tensor.shape)} with too few values for it; {AGAIN}")
    return content


def npz(path: Path) -> dict[str, Tensor]:
    """Read the arrays of a file of `numpy.savez`.

    Raises:
        UserError: An array holds Python objects, the file unpacks to far more than it is, or is damaged.
    """
    _check_zip(path)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except (ValueError, TypeError, OSError, EOFError, MemoryError, KeyError, AttributeError, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} holds Python objects, so that opening it could run code; where you trust it, save its arrays "
                "as numbers, or as safetensors"
            ) from error
        raise UserError(f"{path} is damaged ({_line(error)}); {AGAIN}") from error
    except zipfile.BadZipFile as error:
        raise UserError(f"{path} is damaged ({_line(error)}); {AGAIN}") from error
    return found


def _check_zip(path: Path) -> None:
    """Refuse a file that unpacks to far more than it is, by what its directory says: nothing reads beyond that."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as file:
            unpacked = sum(entry.file_size for entry in file.infolist())
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} is damaged ({_line(error)}); {AGAIN}") from error
    packed = path.stat().st_size
    if unpacked > max(_FREE_BYTES, _MOST_UNPACKED * packed):
        raise UserError(
            f"{path} would unpack from {packed / 1e6:.1f} MB to {unpacked / 1e6:.0f} MB, which no weights do; it is "
            "not opened: get it from where you trust it"
        )


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


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
        raise UserError(f"{path} has {', '.join(foreign[:5])}, which an SAE of its kind does not have; {AGAIN}")
    found = {}
    for ours, theirs in wanted.items():
        tensor = tensors.get(theirs)
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path} has no tensor {theirs}; {AGAIN}")
        if ours.startswith("W_") and tensor.ndim != 2:
            raise UserError(f"{path} has {theirs} of shape {tuple(tensor.shape)}, which is no matrix; {AGAIN}")
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
        UserError: The description is impossible, or a tensor is missing, foreign, of another shape, or not finite.
    """
    if found.norm_scale != 1 or found.target_scale not in (None, 1):
        found, weights = unnormalised(found, weights, weights_path)
    sae = _filled(found, weights, weights_path, dtype, device)
    sae.token_norm = vars(sae.cfg)["normalize_activations"] = found.token_norm
    sae.metadata = found.metadata
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
            raise UserError(f"{found.path} normalises activations by {scale}, which is no scale; {AGAIN}")
    sae = _filled(found, weights, weights_path, torch.float64, "cpu")
    sae.norm_scale.fill_(found.norm_scale)
    sae.target_scale.fill_(found.norm_scale if found.target_scale is None else found.target_scale)
    values, folded = sae.folded()
    values = found.values | values
    return replace(found, architecture=values["architecture"], values=values, norm_scale=1.0, target_scale=None), folded


def _filled(
    found: Found, weights: Mapping[str, Tensor], path: Path, dtype: torch.dtype, device: str | torch.device
) -> SAE:
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
    known = {key.name for key in fields(sae_class.config_class)}
    values = {key: item for key, item in found.values.items() if key in known}
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
                f"{wanted.get(name, '(no such tensor)')}; {AGAIN}"
            )
        if weights[name].dtype not in WEIGHT_TYPES:
            raise UserError(f"{path} has {name} of type {weights[name].dtype}; save it as one of {WEIGHT_TYPES}")
    check_finite(weights, str(path), AGAIN)


def check_finite(weights: Mapping[str, Tensor], where: str, cure: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        UserError: One is NaN or infinite.
    """
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} of {where} holds NaN or infinity; {cure}")
