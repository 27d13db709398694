"""Small language models opened for functions and SAEs at their hook points, in each way, and SAEs that fit them."""

from pathlib import Path
from typing import Any

import small_models
import torch

from saepipe import saes
from saepipe.hooked import HookedSAETransformer, load_model
from saepipe.saes.base import SAE

IDS = torch.randint(2, small_models.VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
HOOK = "blocks.1.hook_resid_post"
WAYS = ("plain", "bridge", "compatible")


def opened(way: str, name: str | Path) -> HookedSAETransformer:
    if way == "plain":
        return load_model(str(name), device="cpu")
    if way == "bridge":
        return HookedSAETransformer.from_pretrained_no_processing(str(name), device="cpu")
    return HookedSAETransformer.from_pretrained(str(name), device="cpu")


def make(
    hook: str = HOOK, d_in: int = small_models.WIDTH, name: str = "standard", d_out: int | None = None, **metadata: Any
) -> SAE:
    """Make an SAE of no use, some of whose latents fire."""
    cls = saes.architecture(name)
    given: dict[str, Any] = {} if d_out is None else {"apply_b_dec_to_input": False}
    given |= {"k": 8} if name in ("topk", "batchtopk", "matryoshka") else {}
    given |= {"matryoshka_widths": [6, 24]} if name == "matryoshka" else {}
    sae = cls(cls.config_class(d_sae=24, **given), d_in, d_out)
    sae.initialise(torch.Generator().manual_seed(d_in))
    sae.metadata = {"hook_name": hook, **metadata}
    return sae


@torch.no_grad()
def by_hand(model: HookedSAETransformer, changes: dict[str, Any], ids: torch.Tensor = IDS) -> torch.Tensor:
    """Run the model with each hook point's activations replaced by what a function makes of them."""
    logits = model._hooks.run(ids, changes)
    assert logits is not None
    return logits
