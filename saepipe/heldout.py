"""How an SAE under training does on the held-out rows of its store, for which no language model is needed."""

from collections.abc import Iterator

import torch
from torch import Tensor

from saepipe.metrics import ReconstructionFit
from saepipe.saes.base import SAE
from saepipe.store import Store

_CHUNK = 4096


@torch.no_grad()
def measure(store: Store, hook: str, target_hook: str, sae: SAE) -> dict[str, float]:
    """Measure an SAE on the ordinary held-out rows (special tokens and position 0 left out).

    Args:
        store: The store.
        hook: Where its input comes from.
        target_hook: What it reconstructs; the same for an autoencoder.
        sae: The SAE.

    Returns:
        `heldout/l0`, `heldout/explained_variance` and the other figures of `ReconstructionFit`, and
        `heldout/dead_fraction`, the share of latents that no row activates. Empty where the store holds no such row.
    """
    fit, device = ReconstructionFit(sae.d_out), sae.W_dec.device
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
    for x, y in _pairs(store, hook, target_hook):
        x, y = x.to(device), y.to(device)
        f = sae.encode(x)
        fit.update(y, sae.decode(f, x))
        fired += (f > 0).sum(0)
    if not fit.rows:
        return {}
    figures = {
        "l0": float(fired.sum() / fit.rows),
        "dead_fraction": float((fired == 0).float().mean()),
        **fit.compute(),
    }
    return {f"heldout/{name}": value for name, value in figures.items()}


def _pairs(store: Store, hook: str, target_hook: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Read the ordinary held-out rows of one hook, and the same tokens' of another."""
    ordinary = (rows[torch.from_numpy(mask)] for rows, mask in store.held_out(hook))
    if hook == target_hook:
        yield from ((rows, rows) for rows in ordinary)
        return
    rows, targets = (  # whole, since the hooks come in chunks of different sizes
        [rows[torch.from_numpy(mask)] for rows, mask in store.held_out(name)] for name in (hook, target_hook)
    )
    if rows:
        yield from zip(torch.cat(rows).split(_CHUNK), torch.cat(targets).split(_CHUNK), strict=True)
