"""Safe readers, which the formats share: what they open was written by strangers.

No file runs code, and none unpacks to much more than it is. Every refusal is a `UserError` that names the file, what is
wrong and the cure.
"""

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from saepipe.errors import UserError
from saepipe.keys import LARGEST

AGAIN = "fetch or export it again"
"""Cure of a file that is damaged."""
# Weights compress to no less than half; rows of dead latents that are all zero may shrink much, but are few.
_MOST_UNPACKED, _FREE_BYTES = 20, 64 * 2**20


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
    # Larger numbers, infinity and NaN are no sizes and no thresholds, and break arithmetic on the way.
    if not fits or (kind in (int, float) and not abs(found) <= LARGEST) or (kind is int and found < 1):
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
        if isinstance(tensor, Tensor) and tensor.layout is not torch.strided:
            raise UserError(f"{path} has {name} as a sparse tensor; save it as a dense one")
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
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(np.ascontiguousarray(arrays[name])) for name in arrays.files}
    except Exception as error:  # what a broken archive raises depends on where it breaks
        if "allow_pickle" in str(error):
            raise UserError(
                f"{path} holds Python objects, so that opening it could run code; where you trust it, save its arrays "
                "as numbers, or as safetensors"
            ) from error
        raise UserError(f"{path} is damaged ({_line(error)}); {AGAIN}") from error
    return found


def _check_zip(path: Path) -> None:
    """Refuse a file that unpacks to far more than it is, by what its directory says: nothing reads beyond that."""
    try:
        if not zipfile.is_zipfile(path):
            return
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


def check_finite(weights: Mapping[str, Tensor], where: str, cure: str) -> None:
    """Refuse weights that are not numbers.

    Raises:
        UserError: One is NaN or infinite.
    """
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{name} of {where} holds NaN or infinity; {cure}")
