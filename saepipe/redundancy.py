"""How far latents repeat, split and absorb one another, as seen without any label.

What these measures find is of the kind that the literature calls by these names, not the same number: theirs need a
concept that is known beforehand (Bricken et al. 2023 and Chanin et al. 2024, arXiv 2409.14507), and here an SAE's own
decoder and what fires together on held-out tokens have to do. They compare SAEs of the same model; their level alone
says little.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CLUSTER_COSINE = 0.9
"""From this cosine of two decoder rows on, two latents write the same direction."""
SPLIT_COSINE = 0.6
"""From this cosine on, two latents that take turns may be parts of one."""
ABSORBING_COSINE = 0.4
"""From this cosine on, a latent can write a good part of another's direction in its stead."""
APART = 0.05
"""Two latents take turns where at most this share of the rarer one's tokens has both."""
_MOST_PAIRS = 1 << 17
"""Pairs of like latents that are looked at: those of the largest cosine."""
_ELEMENTS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Pairs:
    """Pairs of latents whose decoder rows point in similar directions, each pair once."""

    first: Int[Tensor, " pair"]
    second: Int[Tensor, " pair"]
    cosine: Float[Tensor, " pair"]
    nearest: Float[Tensor, " d_sae"]
    """Cosine of each latent's row with the most similar other one; -1 where there is none."""


def similar(W_dec: Float[Tensor, "d_sae d_out"], live: Bool[Tensor, " d_sae"]) -> Pairs:
    """Find the pairs of live latents with a cosine of `ABSORBING_COSINE` and more.

    Args:
        W_dec: Decoder.
        live: Latents that count.
    """
    latents = live.nonzero().squeeze(1)
    rows = torch.nn.functional.normalize(W_dec[latents].float(), dim=1)
    nearest = torch.full((len(W_dec),), -1.0, device=W_dec.device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    step = max(1, _ELEMENTS_AT_ONCE // max(1, len(rows)))
    for start in range(0, len(rows), step):
        cosine = rows[start : start + step] @ rows.T
        here = torch.arange(len(cosine), device=cosine.device)
        cosine[here, start + here] = -1.0
        nearest[latents[start : start + step]] = cosine.amax(1)
        first, second = (cosine >= ABSORBING_COSINE).nonzero(as_tuple=True)
        once = start + first < second
        first, second = first[once], second[once]
        found.append((latents[start + first], latents[second], cosine[first, second]))
    first, second, cosine = (torch.cat(parts) for parts in zip(*found, strict=True))
    if len(cosine) > _MOST_PAIRS:
        order = cosine.argsort(descending=True, stable=True)[:_MOST_PAIRS]
        first, second, cosine = first[order], second[order], cosine[order]
    return Pairs(first, second, cosine, nearest)


def clusters(pairs: Pairs, least_cosine: float) -> list[list[int]]:
    """Group latents that are linked by pairs of at least some cosine, directly or through others; the largest first."""
    root: dict[int, int] = {}

    def find(latent: int) -> int:
        while root.setdefault(latent, latent) != latent:
            root[latent] = root[root[latent]]
            latent = root[latent]
        return latent

    linked = pairs.cosine >= least_cosine
    for one, other in zip(pairs.first[linked].tolist(), pairs.second[linked].tolist(), strict=True):
        root[find(one)] = find(other)
    groups: dict[int, list[int]] = {}
    for latent in sorted(root):
        groups.setdefault(find(latent), []).append(latent)
    return sorted(groups.values(), key=lambda group: (-len(group), group[0]))


def redundancy(W_dec: Float[Tensor, "d_sae d_out"], f: Float[Tensor, "token d_sae"]) -> dict[str, Any]:
    """Measure repetition, splitting and absorption.

    Args:
        W_dec: Decoder.
        f: Activations of the latents on some thousands of tokens, sparse (COO) or dense.

    Returns:
        nearest_cosine: Mean over live latents of the cosine with the nearest other one.
        clusters, clustered_fraction, largest_cluster: Groups of latents linked by `CLUSTER_COSINE`, the share of live
            latents in one, and the number of latents in the largest.
        split_fraction: Share of live latents with a partner of `SPLIT_COSINE` with which they take turns (`APART`).
        absorption_fraction: Mean over live latents: of the tokens at which a latent's direction is written, by itself
            or, as strongly as half of its own mean contribution, by another with which it takes turns, the share at
            which it is itself silent.
        NaN where no latent fired.
    """
    f = f.coalesce() if f.is_sparse else f.to_sparse()
    tokens, device = f.shape[0], W_dec.device
    token, latent = f.indices()
    fired = torch.bincount(latent, minlength=len(W_dec))
    live = fired > 0
    if not live.any():
        return dict.fromkeys(("nearest_cosine", "split_fraction", "absorption_fraction"), float("nan")) | {
            "clusters": 0,
            "clustered_fraction": float("nan"),
            "largest_cluster": 0,
        }
    lengths = W_dec.norm(dim=1)
    written = torch.zeros(len(W_dec), device=device).index_add_(0, latent, f.values().float())
    typical = written * lengths / fired.clamp(min=1)
    pairs = similar(W_dec, live)
    where = torch.stack([latent, token])
    columns = torch.sparse_coo_tensor(where, f.values().float(), (len(W_dec), tokens), check_invariants=False)
    turns, absorbed = _on_tokens(columns.coalesce(), pairs, lengths, typical)
    parts = turns & (pairs.cosine >= SPLIT_COSINE)
    split = torch.zeros_like(live)
    split[pairs.first[parts]] = split[pairs.second[parts]] = True
    groups = clusters(pairs, CLUSTER_COSINE)
    n_live = int(live.sum())
    return {
        "nearest_cosine": float(pairs.nearest[live].double().mean()),
        "clusters": len(groups),
        "clustered_fraction": sum(map(len, groups)) / n_live,
        "largest_cluster": max(map(len, groups), default=0),
        "split_fraction": int(split.sum()) / n_live,
        "absorption_fraction": float((absorbed / (absorbed + fired))[live].double().mean()),
    }


def _on_tokens(
    columns: Tensor, pairs: Pairs, lengths: Float[Tensor, " d_sae"], typical: Float[Tensor, " d_sae"]
) -> tuple[Bool[Tensor, " pair"], Int[Tensor, " d_sae"]]:
    """Tell which pairs take turns, and count the tokens at which one of such a pair writes the silent one's direction.

    Args:
        columns: Activations, sparse [d_sae, token].
        pairs: Pairs of latents.
        lengths: Norm of each decoder row.
        typical: Mean length of what each latent writes where it fires.
    """
    tokens, device = columns.shape[1], lengths.device
    turns = torch.zeros(len(pairs.first), dtype=torch.bool, device=device)
    in_stead: list[Tensor] = []
    step = max(1, _ELEMENTS_AT_ONCE // max(1, tokens))
    for start in range(0, len(pairs.first), step):
        here = slice(start, start + step)
        sides = [columns.index_select(0, side[here]).to_dense() for side in (pairs.first, pairs.second)]
        on = [side > 0 for side in sides]
        turns[here] = (on[0] & on[1]).sum(1) <= APART * torch.minimum(on[0].sum(1), on[1].sum(1))
        for writer, silent, activations, others in (
            (pairs.first[here], pairs.second[here], sides[0], sides[1]),
            (pairs.second[here], pairs.first[here], sides[1], sides[0]),
        ):
            reach = activations * (lengths[writer] * pairs.cosine[here])[:, None] >= typical[silent][:, None] / 2
            row, token = (turns[here, None] & reach & (others <= 0) & (activations > 0)).nonzero(as_tuple=True)
            in_stead.append((silent[row] * tokens + token).unique())
    places = torch.cat(in_stead).unique() if in_stead else torch.zeros(0, dtype=torch.long, device=device)
    return turns, torch.bincount(places // tokens, minlength=len(lengths))
