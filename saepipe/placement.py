"""Which device of this machine a language model runs on."""

import torch

from saepipe.errors import UserError


def device(name: str) -> torch.device:
    """Find the device, or say why it cannot be had."""
    if name == "auto":
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(best)
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device={name} is no device; give auto, cpu, cuda, cuda:1 or mps") from None
    there = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (device.index or 0) >= there.get(device.type, 0):
        raise UserError(
            f"model.device={name} is not on this machine, which has {there['cuda']} CUDA devices; try model.device=auto"
        )
    return device
