"""Matryoshka keeps a parent's feature whole where BatchTopK lets its children absorb it: the toy tree of 20 features.

Source: the toy model that Bussmann et al. 2025 (arXiv 2503.17547) report. Training has local minima, so each SAE is the
best of a few starts by its own loss on samples it was not trained on, which knows nothing of the features.
"""

from typing import Any

import pytest
import torch

from saepipe import saes
from saepipe.config import OptimConfig
from saepipe.matching import match
from saepipe.point import Point
from saepipe.saes.base import SAE, Step
from saepipe.superposition import HELD_OUT, Features, Superposition, cosines

STEPS, BATCH, LR, STARTS = 2000, 200, 0.03, 5
TREES = 3
WIDTHS = [1, 2, 3, 5, 7, 9, 11, 14, 17]

pytestmark = [pytest.mark.prove, pytest.mark.long, pytest.mark.timeout(900)]


def trained(name: str, data: Superposition, start: int, **keys: Any) -> tuple[float, SAE]:
    """Train an SAE as wide as there are features; return its loss on held-out samples, and it."""
    cls = saes.architecture(name)
    cfg = cls.config_class(d_sae=20, k=1.25, normalize_activations="none", dead_after_tokens=200 * BATCH, **keys)
    sae = cls(cfg, 20)
    sae.initialise(torch.Generator().manual_seed(start))
    point = Point(sae, OptimConfig(lr=LR, lr_decay_steps=STEPS // 3), total_steps=STEPS)
    point.make_optimizer()
    for step in range(STEPS):
        x = data.batch(step).x
        point.take_step(x, x, step, measure=False)
    with torch.no_grad():
        held_out = [data.batch(HELD_OUT + number).x for number in range(20)]
        return sum(float(sae.loss(x, x, Step(STEPS)).total) for x in held_out) / len(held_out), sae


def best(name: str, tree: int, **keys: Any) -> tuple[float, float]:
    """Return the least cosine of a latent with its own feature, and the largest with another's, by absolute value."""
    features = Features.toy_tree(seed=tree)
    data = Superposition(features, tree, BATCH)
    _, sae = min((trained(name, data, start, **keys) for start in range(STARTS)), key=lambda found: found[0])
    found = cosines(sae.W_dec, features)
    rows, columns = match(found.abs().numpy())
    matrix = found[rows[columns.argsort()]]
    own = matrix.diag()
    return float(own.min()), float((matrix - torch.diag(own)).abs().max())


@pytest.mark.parametrize("tree", range(TREES))
def test_matryoshka_is_diagonal_where_batchtopk_absorbs(tree: int) -> None:
    own, other = best("matryoshka", tree, matryoshka_widths=WIDTHS)
    print(f"tree {tree}: Matryoshka, each latent's feature {own:.2f} at least, any other's {other:.2f} at most")
    assert own >= 0.88
    assert other <= 0.45
    own, other = best("batchtopk", tree)
    print(f"tree {tree}: BatchTopK {own:.2f}, {other:.2f}")
    assert other >= 0.65  # a child's row holds its parent's direction too
