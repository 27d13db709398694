"""Published SAEs by the names the field gives them: find, download, open."""

from typing import TYPE_CHECKING

import torch

from saepipe import formats, hub

if TYPE_CHECKING:
    from saepipe.saes.base import SAE


def load(
    release: str,
    sae_id: str | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    force_download: bool = False,
) -> "SAE":
    """Open a published SAE, or one in a local folder.

    Args:
        release: Name of a release, hub repository, or local folder.
        sae_id: Which SAE of it: its name in the release, or its folder in the repository.
        device: Where to put it.
        dtype: Type of the weights.
        revision: Branch, tag or commit of the repository.
        force_download: Download again what is in the cache.
    """
    folder = hub.local(release)
    assert folder is not None
    return formats.load(folder / (sae_id or ""), device=device, dtype=dtype)
