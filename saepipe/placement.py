"""Which devices of this machine a language model runs on."""

from dataclasses import dataclass
from typing import Any

import torch

from saepipe.config import ModelConfig
from saepipe.errors import UserError


@dataclass(frozen=True)
class Placement:
    """Where the layers of a model go."""

    device: torch.device
    """Takes the token ids and gives the results; without a `device_map`, the whole model is there."""
    device_map: str | dict[str, str] | None = None
    """How transformers spreads the layers."""
    gpus: tuple[int, ...] = ()
    """The GPUs that it spreads them over."""

    def loading(self) -> dict[str, Any]:
        """Return the arguments of `from_pretrained` that this placement makes."""
        if self.device_map is None:
            return {}
        if not self.gpus:
            return {"device_map": self.device_map}
        # A tenth is left to the activations. No other place is named: layers in the host's memory would be far too slow
        memory = {gpu: int(0.9 * torch.cuda.mem_get_info(gpu)[0]) for gpu in self.gpus}
        return {"device_map": self.device_map, "max_memory": memory}


def here(config: ModelConfig, *, local_rank: int = 0) -> Placement:
    """Find the devices of a worker on this machine; see `choose`."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return choose(config, local_rank=local_rank, n_gpus=n_gpus, has_mps=torch.backends.mps.is_available())


def choose(config: ModelConfig, *, local_rank: int, n_gpus: int, has_mps: bool) -> Placement:
    """Choose the devices of a worker.

    Args:
        config: The model group of the configuration.
        local_rank: The worker's place among those on its machine: each takes the next `model.n_devices` GPUs.
        n_gpus: CUDA GPUs of the machine.
        has_mps: Whether it has Apple's GPU.

    Raises:
        UserError: The devices are not there.
    """
    kind, index = _parsed(config.device, "cuda" if n_gpus else "mps" if has_mps else "cpu")
    if kind != "cuda":
        if config.n_devices > 1:
            raise UserError(
                f"model.n_devices={config.n_devices} needs as many CUDA GPUs, and with model.device={config.device} "
                f"the model runs on {kind} here; set model.n_devices=1"
            )
        if kind != "cpu" and not (kind == "mps" and has_mps):
            raise _absent(config, n_gpus)
        return Placement(torch.device(kind), {"": kind} if config.device_map else None)
    if not n_gpus:
        raise _absent(config, n_gpus)
    first = _first_gpu(config, index, local_rank, n_gpus)
    gpus = tuple(range(first, first + config.n_devices))
    device_map = config.device_map or ("auto" if len(gpus) > 1 else None)
    return Placement(torch.device("cuda", first), device_map, gpus)


def _parsed(name: str, best: str) -> tuple[str, int | None]:
    """Part a device's name into its kind and its number."""
    if name == "auto":
        return best, None
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"model.device={name} is no device; give auto, cpu, cuda, cuda:1 or mps") from None
    return device.type, device.index


def _first_gpu(config: ModelConfig, index: int | None, local_rank: int, n_gpus: int) -> int:
    """Find where a worker's GPUs begin."""
    n = config.n_devices
    if index is not None and local_rank:
        raise UserError(
            f"model.device={config.device} names one place for all workers of this machine, and this is worker "
            f"{local_rank}; give model.device=cuda, which gives each its own GPUs"
        )
    first = local_rank * n if index is None else index
    if first + n <= n_gpus:
        return first
    if index is not None and n == 1:
        raise _absent(config, n_gpus)
    if n > n_gpus or index is not None:
        raise UserError(
            f"model.n_devices={n} from model.device={config.device} on are not on this machine, which has {n_gpus} "
            f"CUDA devices; set model.device=cuda and model.n_devices to at most {n_gpus}"
        )
    raise UserError(
        f"model.device={config.device} with model.n_devices={n} gives worker {local_rank} of this machine the GPUs "
        f"from {first} on, and there are {n_gpus}; start at most {n_gpus // n} workers here"
    )


def _absent(config: ModelConfig, n_gpus: int) -> UserError:
    return UserError(
        f"model.device={config.device} is not on this machine, which has {n_gpus} CUDA devices; try model.device=auto"
    )
