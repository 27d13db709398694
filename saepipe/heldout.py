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
        fired += (f > 0).sum(0, dtype=torch.float32).long()  # its default would be an int64 of each f
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
    if hook == target_hook:
        yield from ((rows, rows) for rows in _ordinary(store, hook))
    else:
        yield from zip(*(_in_chunks(_ordinary(store, name)) for name in (hook, target_hook)), strict=True)


def _ordinary(store: Store, hook: str) -> Iterator[Tensor]:
    return (rows[torch.from_numpy(mask)] for rows, mask in store.held_out(hook))


def _in_chunks(parts: Iterator[Tensor]) -> Iterator[Tensor]:
    """Cut rows anew into chunks of one size, since each hook's come in one of their own."""
    rest: Tensor | None = None
    for part in parts:
        rest = part if rest is None else torch.cat([rest, part])
        while len(rest) >= _CHUNK:
            yield rest[:_CHUNK]
            rest = rest[_CHUNK:]
    if rest is not None and len(rest):
        yield rest
