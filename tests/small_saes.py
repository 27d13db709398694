"""Small SAEs of any architecture, as after some training, and activations for them."""

from typing import Any

import torch
from torch import Tensor

from saepipe import saes
from saepipe.saes.base import SAE

D_IN, D_OUT, D_SAE, TOKENS = 16, 10, 48, 32
DEAD = torch.tensor([0, 3, 5])


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **values: Any) -> SAE:
    cls = saes.architecture(name)
    sae = cls(cls.config_class(d_sae=D_SAE, **values), D_IN)
    sae.initialise(torch.Generator().manual_seed(seed), mean=data().mean(0), norm_scale=0.4)
    return trained(sae).to(dtype)


def make_transcoder(name: str, dtype: torch.dtype = torch.float32, *, d_out: int = D_OUT, **values: Any) -> SAE:
    cls = saes.architecture(name)
    sae = cls(cls.config_class(d_sae=D_SAE, apply_b_dec_to_input=False, **values), D_IN, d_out)
    generator = torch.Generator().manual_seed(0)
    sae.initialise(generator, mean=targets(d_out).mean(0), norm_scale=0.4, target_scale=0.7)
    if sae.W_skip is not None:
        torch.nn.init.normal_(sae.W_skip, std=0.1, generator=generator)
    return trained(sae).to(dtype)


@torch.no_grad()
def trained(sae: SAE) -> SAE:
    """Change an SAE as some training does: no two rows of the same norm."""
    sae.W_dec.mul_(torch.linspace(0.5, 2, D_SAE)[:, None])
    for vector in sae.latent_parameters:
        lowest = 0 if vector == "threshold" else -0.1
        sae.get_parameter(vector).copy_(torch.linspace(lowest, 0.1, D_SAE))
    return sae


def data(*shape: int) -> Tensor:
    return 3 * torch.randn(*(shape or (TOKENS,)), D_IN, generator=torch.Generator().manual_seed(5)) + 1


def targets(d_out: int) -> Tensor:
    """What a transcoder may predict of `data()`: some of it, and something else."""
    noise = torch.randn(TOKENS, d_out, generator=torch.Generator().manual_seed(6))
    return data()[:, :d_out].abs() + noise - 2
