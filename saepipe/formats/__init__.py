"""SAEs of this and other libraries, in folders: one file per library, and a folder says itself which one wrote it.

Each file of FORMATS has SIGN, the names of the files that one knows a folder by, and the same three functions, of which
`save` is there where we write the format:

    recognises(path) -> bool                          does this look like one of its folders (or files)?
    load(path, *, device, dtype) -> SAE               takes raw activations, and knows its metadata
    save(sae, folder, *, metadata, sparsity)          refuses what the format cannot say, and never bends it

Whatever a layout normalises activations by is in the weights that `load` gives, or in `token_norm`, or the folder is
refused: an SAE is never opened with other numbers than it was trained with.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepipe import durable
from saepipe.errors import UserError, unknown

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from saepipe.saes.base import SAE

FORMATS = ("saelens", "sparsify", "dictionary_learning", "llama_scope", "gemma_scope", "openai")
"""Names of the files, in the order in which they are asked whether a folder is theirs."""
WRITTEN = ("saelens", "sparsify", "dictionary_learning")
"""Those that have a `save`."""


def detect(path: str | Path) -> str:
    """Say in which format a folder or file is.

    Raises:
        UserError: It is not there, or in none of them; the message says what each one looks for.
    """
    path = Path(path).expanduser()
    try:
        there = path.exists()
    except OSError as error:  # a name that is too long, a folder that nobody lets us into
        raise UserError(f"{path} cannot be read ({error.strerror}); give another folder") from error
    if not there:
        raise UserError(f"{path} does not exist; give the folder of an SAE, such as the sae folder of a finished run")
    for name in FORMATS:
        if _module(name).recognises(path):
            return name
    if (path / "sae").is_dir():
        raise UserError(f"{path} is the folder of a run; give {path / 'sae'}")
    signs = "; ".join(f"{name}: {_module(name).SIGN}" for name in FORMATS)
    raise UserError(f"{path} is no SAE in a format that is known here; give a folder or file with one of {signs}")


def check_device(device: "str | torch.device") -> None:
    """Make sure that a device is there.

    Raises:
        UserError: It is not.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # of a device that this build of torch lacks, and of no device
        reason = str(error).splitlines()[0]
        raise UserError(f"device={device} is not on this machine ({reason}); give cpu, or a device that is") from error


def load(
    path: str | Path,
    *,
    format: str | None = None,
    device: "str | torch.device" = "cpu",
    dtype: "torch.dtype | None" = None,
    norm_scale: float | None = None,
) -> "SAE":
    """Open an SAE in any format.

    Args:
        path: Folder or file.
        format: Name of the format; None finds out.
        device: Where to put it.
        dtype: Type of the weights; None is float32.
        norm_scale: What inputs are to be multiplied by, for a folder of SAELens's that leaves it to its release
            (`norm_scaling_factor`); it is folded into the weights.

    Raises:
        UserError: It is missing, damaged, in an unknown format, or says something that this library cannot keep; or
            there is no such device.
    """
    path = Path(path).expanduser()
    name = detect(path) if format is None else format
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    import torch

    if norm_scale is not None and name != "saelens":
        raise UserError(
            f"{path} is in the format {name}, which says itself what it was scaled by; leave norm_scale out"
        )
    check_device(device)
    options = {} if norm_scale is None else {"norm_scale": norm_scale}
    sae: SAE = _module(name).load(path, device=device, dtype=dtype or torch.float32, **options)
    return sae


def save(
    sae: "SAE",
    folder: str | Path,
    *,
    format: str = "saelens",
    metadata: dict[str, Any] | None = None,
    sparsity: 'Float[Tensor, " d_sae"] | None' = None,
) -> None:
    """Write an SAE for another library, so that it takes raw activations there too.

    Args:
        sae: The SAE; it stays as it is.
        folder: Where to.
        format: One of WRITTEN.
        metadata: What it was trained on; None is its own.
        sparsity: Fraction of the tokens on which each latent fired; None is its own.

    Raises:
        UserError: The format has no way to say what this SAE is, or the folder has one in another format.
    """
    if format not in WRITTEN:
        raise unknown("format", format, WRITTEN)
    try:
        folder = Path(folder).expanduser()
    except RuntimeError as error:
        raise UserError(f"{folder} cannot be found ({error}); give another folder") from error
    other = next((name for name in FORMATS if name != format and _module(name).recognises(folder)), None)
    if other:
        raise UserError(f"{folder} has an SAE in the format {other}, which this would mix with; choose another folder")
    if sparsity is None and sae.log_sparsity is not None:
        # Without the floor that writing adds, or a silent latent would seem to fire more with each copy
        sparsity = (10 ** sae.log_sparsity.cpu().double() - _module("saelens").SPARSITY_FLOOR).clamp(min=0)
    with durable.disk_errors("folder", folder):
        _module(format).save(sae, folder, metadata=sae.metadata if metadata is None else metadata, sparsity=sparsity)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")
